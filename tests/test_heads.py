"""Which models have logits that are their head's output alone, and how the others are trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hfkit.errors import HfkitError
from hfkit.model.heads import is_plain
from hfkit.training.settings import BadSteps
from hfkit.training.trainer import HfkitTrainer, training_arguments

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(3, 43).view(2, 20)


def model_of(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES, **fields))


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("Llama", {}, True),
        ("Gemma2", {"head_dim": 8}, False),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None}, True),
        ("Gemma3Text", {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
        ("Cohere", {}, False),
        ("Granite", {"logits_scaling": 8.0}, False),
        ("Granite", {}, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_and_a_scale_show_in_a_fresh_model(kind: str, fields: dict, expected: bool, dtype: torch.dtype) -> None:
    model = model_of(kind, **fields).to(dtype)
    before = model(IDS).logits
    assert is_plain(model) == expected
    assert torch.equal(model(IDS).logits, before) and not model.get_output_embeddings()._forward_pre_hooks
    assert model.training


def trainer_of(model: Any, folder: Path, **options: Any) -> HfkitTrainer:
    args = training_arguments({"use_cpu": True, "report_to": "none"}, folder)
    return HfkitTrainer(model, args, BadSteps(), **options)


def test_a_capped_model_is_trained_with_its_cap(tmp_path: Path) -> None:
    model = model_of("Gemma2", head_dim=8, final_logit_softcapping=1e-3).train()
    trainer_of(model, tmp_path)
    loss = model(input_ids=IDS, labels=IDS).loss  # all logits are within the cap: all tokens are equally likely
    torch.testing.assert_close(loss, torch.tensor(61.0).log(), rtol=1e-3, atol=1e-3)


def test_losses_of_a_distillation_refuse_a_capped_student(tmp_path: Path) -> None:
    with pytest.raises(HfkitError, match="losses: a model of type gemma2 caps or scales its logits"):
        trainer_of(model_of("Gemma2", head_dim=8), tmp_path, loss_of=lambda *_: torch.zeros(()))
