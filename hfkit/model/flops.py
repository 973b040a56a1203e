"""The arithmetic of a model, from its sizes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def training_flops_per_token(model: "PreTrainedModel", sequence_length: int) -> float:
    """Return the FLOPs of forward and backward: 6 per trained weight that multiplies, 4 per frozen one, and 12 *
    layers * width * tokens for attention.

    Source: PaLM (arXiv 2204.02311), appendix B. A frozen weight passes gradients on but gets none. An embedding that
    is not the head too only looks rows up.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    flops = 0
    for parameter in model.parameters():
        if parameter is not embedding or config.tie_word_embeddings:
            flops += (6 if parameter.requires_grad else 4) * parameter.numel()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return flops + 12 * config.num_hidden_layers * width * sequence_length
