"""The hfkit model, registered with transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_hfkit import HfkitConfig
from .modeling_hfkit import HfkitForCausalLM, HfkitForSequenceClassification, HfkitModel, HfkitPreTrainedModel

# `register` makes the Auto classes know the names here; `register_for_auto_class` writes `auto_map` and the two files
# beside the weights, so that they load where hfkit is not installed.
AutoConfig.register("hfkit", HfkitConfig, exist_ok=True)
HfkitConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, HfkitModel),
    (AutoModelForCausalLM, HfkitForCausalLM),
    (AutoModelForSequenceClassification, HfkitForSequenceClassification),
):
    _auto_class.register(HfkitConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "HfkitConfig",
    "HfkitForCausalLM",
    "HfkitForSequenceClassification",
    "HfkitModel",
    "HfkitPreTrainedModel",
]
