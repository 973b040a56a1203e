"""hfkit: raw text to a small, tested, served language model, one YAML recipe a step."""

import importlib
from typing import TYPE_CHECKING, Any

from hfkit.version import __version__

# Loaded, and with them torch and transformers, when one of them is first asked for.
_NAMES = {
    "HfkitConfig": "model",
    "HfkitForCausalLM": "model",
    "HfkitForSequenceClassification": "model",
    "HfkitModel": "model",
    "HfkitPreTrainedModel": "model",
    "load_metric": "metrics.catalogue",
}
__all__ = ["__version__", *_NAMES]

if TYPE_CHECKING:
    from hfkit.metrics.catalogue import load_metric as load_metric
    from hfkit.model import HfkitConfig as HfkitConfig
    from hfkit.model import HfkitForCausalLM as HfkitForCausalLM
    from hfkit.model import HfkitForSequenceClassification as HfkitForSequenceClassification
    from hfkit.model import HfkitModel as HfkitModel
    from hfkit.model import HfkitPreTrainedModel as HfkitPreTrainedModel


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"hfkit.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'hfkit' has no attribute {name!r}")
