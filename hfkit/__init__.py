"""hfkit: raw text to a small, tested, served language model, one YAML recipe a step."""

import importlib
from typing import TYPE_CHECKING, Any

from hfkit.version import __version__

_STAGES = (
    "compare",
    "distill",
    "evaluate",
    "finetune",
    "prepare",
    "pretrain",
    "prune",
    "quantize",
    "train_tokenizer",
)
# Loaded, and with them torch and transformers, when one of them is first asked for.
_NAMES = {
    "HfkitConfig": "model",
    "HfkitForCausalLM": "model",
    "HfkitForSequenceClassification": "model",
    "HfkitModel": "model",
    "HfkitPreTrainedModel": "model",
    "Result": "artifacts.result",
    "generate": "inference.prompting",
    "load_metric": "metrics.catalogue",
    **dict.fromkeys(_STAGES, "engine.python"),
    "plan": "planning.plan",
    "push": "hub.push",
    "run": "engine.runner",
    "serve": "engine.background",
}
__all__ = ["__version__", *_NAMES]

if TYPE_CHECKING:
    from hfkit.artifacts.result import Result as Result
    from hfkit.engine.background import serve as serve
    from hfkit.engine.python import compare as compare
    from hfkit.engine.python import distill as distill
    from hfkit.engine.python import evaluate as evaluate
    from hfkit.engine.python import finetune as finetune
    from hfkit.engine.python import prepare as prepare
    from hfkit.engine.python import pretrain as pretrain
    from hfkit.engine.python import prune as prune
    from hfkit.engine.python import quantize as quantize
    from hfkit.engine.python import train_tokenizer as train_tokenizer
    from hfkit.engine.runner import run as run
    from hfkit.hub.push import push as push
    from hfkit.inference.prompting import generate as generate
    from hfkit.metrics.catalogue import load_metric as load_metric
    from hfkit.model import HfkitConfig as HfkitConfig
    from hfkit.model import HfkitForCausalLM as HfkitForCausalLM
    from hfkit.model import HfkitForSequenceClassification as HfkitForSequenceClassification
    from hfkit.model import HfkitModel as HfkitModel
    from hfkit.model import HfkitPreTrainedModel as HfkitPreTrainedModel
    from hfkit.planning.plan import plan as plan


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"hfkit.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'hfkit' has no attribute {name!r}")
