"""Flash attention, with plain torch in place of its kernels, which need a GPU: everything around them is as it is."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_attention

from hfkit.distillation.objective import Objective
from hfkit.distillation.settings import Loss
from hfkit.distillation.teacher import Teacher
from hfkit.distillation.trainer import DistillationTrainer
from hfkit.inference.generation import generate
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.heads import is_plain
from hfkit.training.trainer import HfkitTrainer, training_arguments

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 16}


def hfkit() -> PreTrainedModel:
    torch.manual_seed(0)
    return HfkitForCausalLM(HfkitConfig(**SHAPE))


def llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))


class Rows(torch.utils.data.Dataset):
    """Rows of several documents, which lie elsewhere in each."""

    bytes = 100

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        starts = [0, 3 + index, 9 + index]
        positions = torch.cat(
            [torch.arange(end - start) for start, end in zip(starts, [*starts[1:], 16], strict=True)]
        )
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    called: list[str] = []

    def whole(query: Any, key: Any, value: Any, causal: bool, softmax_scale: float) -> torch.Tensor:
        """Of (batch, tokens, heads, head_dim)."""
        assert query.dtype == key.dtype == value.dtype
        called.append(str(query.dtype))
        states = (each.transpose(1, 2) for each in (query, key, value))
        found = functional.scaled_dot_product_attention(
            *states, is_causal=causal, scale=softmax_scale, enable_gqa=True
        )
        return found.transpose(1, 2)

    def varlen(query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> torch.Tensor:
        """Of (tokens, heads, head_dim), where sequences lie one after the other."""
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert options.pop("max_seqlen_q") == options.pop("max_seqlen_k") >= cu_seqlens_q.diff().max()
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(each.split(sizes) for each in (query, key, value)), strict=True)
        found = torch.cat([whole(*(each[None] for each in part), **options)[0] for part in parts])
        called.append("varlen")
        return found

    known = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), True)
    names = ("dropout_p", "window_size", "deterministic", "softcap", "s_aux", "learnable_sink", "cache_seqlens")
    process = partial(
        flash_attention._process_flash_attention_kwargs, supports_mapping=dict.fromkeys(names, False) | known
    )
    functions = ((whole, varlen, None, None, None), (process, dict))
    monkeypatch.setattr(flash_attention, "lazy_import_flash_attention", lambda *_, **__: functions)
    return called


def trained(kind: type[HfkitTrainer], model: Any, attention: str, folder: Any, **more: Any) -> list[float]:
    """Losses of a short training in batches of two rows, and of an evaluation after it."""
    model.config._attn_implementation = attention
    values = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "max_steps": 3, **more}
    defaults = {"remove_unused_columns": False, "save_strategy": "no", "per_device_eval_batch_size": 2}
    args = training_arguments(values, folder, **defaults)
    objective: dict[str, Any] = {}
    if kind is DistillationTrainer:
        objective["objective"] = Objective([Loss(loss="forward_kl")], model, model.config, 64, compiled=False)
        objective["teacher"] = Teacher(llama(seed=1), set(), {})
    trainer = kind(model, args, train_dataset=Rows(), **objective)
    return [trainer.train().training_loss, *trainer.token_metrics(Rows(), "evaluating", intervals=False).values()]


@pytest.mark.parametrize("kind", [HfkitTrainer, DistillationTrainer])
@pytest.mark.parametrize("make", [hfkit, llama])
def test_documents_in_batches_of_several_rows_do_not_see_each_other(
    make: Any, kind: Any, calls: list[str], tmp_path: Any
) -> None:
    """transformers itself looks for them in batches of one row only."""
    expected, found = (trained(kind, make(), attention, tmp_path) for attention in ("sdpa", "flash_attention_2"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert calls.count("varlen") == 2 * 3  # of each layer in each step; evaluations do without


def test_kernels_get_halves_where_norms_give_float32(calls: list[str], tmp_path: Any) -> None:
    trained(HfkitTrainer, hfkit(), "flash_attention_2", tmp_path, bf16=True)
    assert set(calls) == {"varlen", "torch.bfloat16"}


def test_what_is_read_and_written_does_without_the_kernels(calls: list[str]) -> None:
    """They know neither float32 nor CPUs."""
    model, prompts = hfkit(), [[5, 6, 7], [8, 9]]
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=1, decode=lambda ids, **_: str(ids))
    expected = generate(model, tokenizer, prompts, 2, {"max_new_tokens": 4, "eos_token_id": 1})
    model.config._attn_implementation = "flash_attention_2"
    assert generate(model, tokenizer, prompts, 2, {"max_new_tokens": 4, "eos_token_id": 1}) == expected
    assert is_plain(model) and calls == []
    assert model.config._attn_implementation == "flash_attention_2"
