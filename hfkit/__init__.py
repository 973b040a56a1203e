"""hfkit: raw text to a small, tested, served language model, one YAML recipe a step."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODEL_NAMES = (
    "HfkitConfig",
    "HfkitForCausalLM",
    "HfkitForSequenceClassification",
    "HfkitModel",
    "HfkitPreTrainedModel",
)
__all__ = ["__version__", *_MODEL_NAMES]

if TYPE_CHECKING:
    from hfkit.model import HfkitConfig as HfkitConfig
    from hfkit.model import HfkitForCausalLM as HfkitForCausalLM
    from hfkit.model import HfkitForSequenceClassification as HfkitForSequenceClassification
    from hfkit.model import HfkitModel as HfkitModel
    from hfkit.model import HfkitPreTrainedModel as HfkitPreTrainedModel


def __getattr__(name: str) -> Any:
    """Load the model classes, and with them torch and transformers, when one of them is first asked for."""
    if name in _MODEL_NAMES:
        from hfkit import model

        return getattr(model, name)
    raise AttributeError(f"module 'hfkit' has no attribute {name!r}")
