"""The private names of libraries that hfkit leans on: an upgrade that changes one says so here, before it bites."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import transformers

PACKAGE = Path(__file__).parent.parent / "hfkit"
TRAINER = "transformers.trainer:Trainer"
# Of each the names of its parameters; None where it has no signature, or is no function.
PRIVATE: dict[str, tuple[str, ...] | None] = {
    f"{TRAINER}._finalize_training": ("self", "trial", "num_train_samples", "start_time"),
    f"{TRAINER}._get_grad_norm": ("self", "model", "grad_norm"),
    f"{TRAINER}._get_num_items_in_batch": ("self", "batch_samples", "device"),
    f"{TRAINER}._get_train_sampler": ("self", "train_dataset"),
    f"{TRAINER}._load_best_model": ("self",),
    f"{TRAINER}._load_optimizer_and_scheduler": ("self", "checkpoint"),
    f"{TRAINER}._maybe_log_save_evaluate": (
        *("self", "tr_loss", "grad_norm", "model", "trial", "epoch"),
        *("ignore_keys_for_eval", "start_time", "learning_rate"),
    ),
    f"{TRAINER}._prepare_inputs": ("self", "inputs"),
    f"{TRAINER}._run_epoch": (
        *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ),
    f"{TRAINER}._save": ("self", "output_dir", "state_dict"),
    f"{TRAINER}._save_checkpoint": ("self", "model", "trial"),
    "transformers.trainer:_is_peft_model": ("model",),
    "transformers:PreTrainedModel._init_weights": ("self", "module"),
    "transformers:PreTrainedModel._no_split_modules": None,
    "evaluate:Metric._build_data_dir": ("self",),
    "evaluate:Metric._compute": ("self", "predictions", "references", "kwargs"),
    "evaluate:Metric._feature_names": ("self",),
    "evaluate:Metric._info": ("self",),
    "torch:_foreach_add_": None,
    "torch:_foreach_lerp": None,
    "torch:_foreach_lerp_": None,
    "torch:_foreach_mul_": None,
    "torch.ops:mkldnn._is_mkldnn_bf16_supported": None,
    "torch._subclasses.fake_tensor:FakeTensorMode": None,
}


@pytest.mark.parametrize("place", PRIVATE)
def test_a_private_name_is_as_it_was(place: str) -> None:
    module, _, path = place.partition(":")
    found: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        found = getattr(found, owner)
    is_field = name in getattr(found, "__dataclass_fields__", {}) or name in getattr(found, "__annotations__", {})
    assert hasattr(found, name) or is_field
    expected = PRIVATE[place]
    if expected is not None:
        assert tuple(inspect.signature(getattr(found, name)).parameters) == expected


def test_how_many_gpus_a_process_drives_is_known() -> None:
    args = transformers.TrainingArguments("unused", use_cpu=True)
    assert args.n_gpu == args._n_gpu


def test_every_private_method_that_is_extended_is_listed() -> None:
    """A `super()._name(...)` is of a library unless a class of hfkit defines it too."""
    listed = {place.rpartition(".")[2] for place in PRIVATE}
    used, own = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
                of_torch = isinstance(node.value, ast.Name) and node.value.id in ("torch", "transformers")
                if is_super or of_torch:
                    used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hfkit"):
                used |= {alias.name for alias in node.names if alias.name.startswith("_")}
            if isinstance(node, ast.ClassDef) and not node.bases:
                own |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    assert used - own - {"_dynamo", "_C"} <= {name.rpartition(":")[2] for name in listed}
