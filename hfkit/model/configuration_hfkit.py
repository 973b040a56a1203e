"""Configuration of the hfkit models. Loads alone: copied beside the weights, it needs only transformers."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class HfkitConfig(PreTrainedConfig):
    r"""Shape of an hfkit decoder.

    With `position_embedding_type="rope"` the parameter names and the arithmetic are those of Qwen3 (`qk_norm=True`) or
    of Llama (`qk_norm=False`): `stock_config` gives the `config.json` under which a checkpoint opens as that class.

    Args:
        vocab_size (`int`): Rows of the embedding. At least the size of the tokenizer.
        hidden_size (`int`): Width of the residual stream.
        intermediate_size (`int`, *optional*): Width of the gated MLP. By default 8/3 of `hidden_size`, rounded up to
            a multiple of 64 (Shazeer, 2020, arXiv 2002.05202: a gated MLP of as many parameters as a plain one of 4x).
        num_hidden_layers (`int`): Depth.
        num_attention_heads (`int`): Query heads.
        num_key_value_heads (`int`, *optional*): Key and value heads, a divisor of `num_attention_heads` (grouped-query
            attention, arXiv 2305.13245). By default `num_attention_heads`.
        head_dim (`int`, *optional*): Width of one head. By default `hidden_size / num_attention_heads`.
        hidden_act (`str`): Activation of the gated MLP.
        max_position_embeddings (`int`): Longest sequence, in tokens.
        position_embedding_type (`str`): `rope` (arXiv 2104.09864), `learned` (one vector a position, as in GPT-2) or
            `sinusoidal` (arXiv 1706.03762). Only `rope` opens as a stock class.
        rope_parameters (`dict`, *optional*): `rope_theta`, `rope_type` and what that type needs, as in transformers.
        qk_norm (`bool`): RMSNorm on the queries and keys of each head (arXiv 2302.05442).
        rms_norm_eps (`float`): Added to the mean square under the root.
        attention_dropout (`float`): Share of the attention weights dropped in training.
        tie_word_embeddings (`bool`): One matrix for the embedding and the language-model head.
        initializer_range (`float`): Standard deviation of the normal initialisation.
        embedding_initializer_range (`float`, *optional*): That of the embedding. By default `initializer_range`.
        head_initializer_range (`float`, *optional*): That of a language-model head that is not tied. By default
            `initializer_range`.
        residual_initialization (`str`): How the two projections that write into the residual stream start: `normal`
            like the others, `scaled` by 1/sqrt(2 * layers) as in GPT-2, or `zero`, so that each layer starts as the
            identity.
        use_cache (`bool`): Return key and value states for generation.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special ids, taken from the tokenizer.

    Raises:
        huggingface_hub.errors.StrictDataclassError: where a value has the wrong type, or two do not fit each other.
    """

    model_type = "hfkit"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["rope", "learned", "sinusoidal"] = "rope"
    rope_parameters: dict | None = None
    qk_norm: bool = True
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    head_initializer_range: float | None = None
    residual_initialization: Literal["normal", "scaled", "zero"] = "normal"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
            self._head_dim_is_derived = True
        # Every class that can open the weights, not only the one that saved them (vLLM asks for AutoModel).
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_hfkit.HfkitConfig",
                "AutoModel": "modeling_hfkit.HfkitModel",
                "AutoModelForCausalLM": "modeling_hfkit.HfkitForCausalLM",
                "AutoModelForSequenceClassification": "modeling_hfkit.HfkitForSequenceClassification",
            },
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Hold each size positive and each pair of sizes together.

        Raises:
            ValueError: naming the key, its value and the rule.
        """
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.__dict__.pop("_head_dim_is_derived", False) and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: must divide hidden_size={self.hidden_size}, "
                f"or set head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even for rotary positions")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size}: must be even for sinusoidal positions")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout}: must be at least 0 and below 1")

    def stock_config(self) -> dict:
        """The `config.json` under which the same weights open as `Qwen3ForCausalLM` or `LlamaForCausalLM`.

        Raises:
            ValueError: if the positions are not rotary, which no stock class of this arithmetic has.
        """
        if self.position_embedding_type != "rope":
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type}: only rope opens as a stock class"
            )
        config = self.to_dict()
        own = ("qk_norm", "position_embedding_type", "residual_initialization")
        for key in ("auto_map", *own, "embedding_initializer_range", "head_initializer_range"):
            config.pop(key, None)
        family = "Qwen3" if self.qk_norm else "Llama"
        architectures = [name.replace("Hfkit", family) for name in self.architectures or ["HfkitForCausalLM"]]
        return {**config, "model_type": family.lower(), "architectures": architectures}


__all__ = ["HfkitConfig"]
