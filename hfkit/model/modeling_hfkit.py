"""The hfkit decoder. Loads alone: copied beside the weights, it needs only torch and transformers.

Parameter names and arithmetic are those of transformers' Qwen3 (with `qk_norm`) and Llama (without).
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hfkit import HfkitConfig

# The keys and values of earlier tokens are called `cache` since transformers 5.24, and were `past_key_values` before:
# the model takes both names, and gives them back under that of the version at hand.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class HfkitRMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class HfkitRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, (batch, sequence, head_dim) each.

    The frequencies are computed on every call: a non-persistent buffer would be left as garbage by a loader that
    allocates on the meta device, and the work is head_dim / 2 powers.
    """

    def __init__(self, config: HfkitConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor):
        device, scaling = hidden_states.device, 1.0
        if self.rope_type == "default":
            exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.float, device=device)
            inv_freq = 1.0 / (self.config.rope_parameters["rope_theta"] ** (exponents / self.config.head_dim))
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](
                self.config, device, seq_len=position_ids.max() + 1
            )
        freqs = position_ids[..., None].float() * inv_freq.float()  # (batch, sequence, head_dim / 2)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


class HfkitSinusoidalEmbedding(nn.Module):
    """Fixed sines and cosines of geometric wavelengths (arXiv 1706.03762, section 3.5), without parameters."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    @torch.no_grad()
    def forward(self, position_ids: torch.LongTensor) -> torch.Tensor:
        exponents = torch.arange(0, self.hidden_size, 2, dtype=torch.float, device=position_ids.device)
        angles = position_ids[..., None].float() / 10000 ** (exponents / self.hidden_size)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # (batch, sequence, hidden)


def residual_projection(in_features: int, out_features: int) -> nn.Linear:
    """A linear map that writes into the residual stream. Quantizers look for `nn.Linear` itself: it is no class."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.writes_residual = True
    return linear


class HfkitMLP(nn.Module):
    """Gated MLP (SwiGLU with `hidden_act="silu"`)."""

    def __init__(self, config: HfkitConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + head_dim / 2) by a quarter."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(query, key, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys (batch, heads, sequence, head_dim) by the angles (batch, sequence, head_dim)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain tensor operations. Returns (batch, query, heads, head_dim) and the attention weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (batch, heads, key, head_dim)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (batch, heads, query, key)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    return torch.matmul(attn_weights, value).transpose(1, 2).contiguous(), attn_weights


class HfkitAttention(nn.Module):
    """Grouped-query attention with optional rotary positions and QK-norm."""

    def __init__(self, config: HfkitConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = residual_projection(config.num_attention_heads * self.head_dim, config.hidden_size)
        self.q_norm = HfkitRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = HfkitRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)  # (batch, heads, sequence, head_dim)

        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            # A paged cache (continuous batching) also reads and writes the arguments of the attention function.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        # The cache is updated by now: a paged function, such as `paged|eager`, has nothing left to do but to attend.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation.removeprefix("paged|"), eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1)), attn_weights


class HfkitDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: HfkitConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HfkitAttention(config, layer_idx)
        self.mlp = HfkitMLP(config)
        self.input_layernorm = HfkitRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HfkitRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HfkitPreTrainedModel(PreTrainedModel):
    """What every hfkit model shares: its configuration, its abilities and its initialisation."""

    config: HfkitConfig
    config_class = HfkitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfkitDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": HfkitDecoderLayer, "attentions": HfkitAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_initializer_range is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        if module is getattr(self, "lm_head", None) and self.config.head_initializer_range is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.head_initializer_range)
        if getattr(module, "writes_residual", False) and self.config.residual_initialization != "normal":
            scaled = self.config.residual_initialization == "scaled"
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5 if scaled else 0.0
            init.normal_(module.weight, mean=0.0, std=std)


class HfkitModel(HfkitPreTrainedModel):
    """Token ids (batch, sequence) to hidden states (batch, sequence, hidden).

    Without an attention mask, `position_ids` that start again within a row mark packed documents: no token attends
    across the start of a document.
    """

    def __init__(self, config: HfkitConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HfkitDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = HfkitRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.position_embedding_type == "rope":
            self.rotary_emb = HfkitRotaryEmbedding(config)
        elif config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.embed_positions = HfkitSinusoidalEmbedding(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        sequence = inputs_embeds.shape[1]
        is_one_document = attention_mask is None and position_ids is None and cache is None
        has_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        if position_ids is None and has_padding_mask and self.config.position_embedding_type != "rope":
            # Absolute positions count from the first token, wherever the padding ends.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -sequence:]
        elif position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(sequence, device=inputs_embeds.device) + seen).unsqueeze(0)

        # `generate` hands over a mask per layer type that it prepared itself; all of our layers are of one type.
        if isinstance(attention_mask, dict):
            causal_mask = attention_mask["full_attention"]
        elif is_one_document and self.config._attn_implementation == "sdpa":
            causal_mask = None  # sdpa needs none, and with the one that is made while compiling has no flash kernel
        else:
            causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)

        # After the mask: with a cache at hand, transformers does not look for packed documents.
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        else:
            hidden_states = hidden_states + self.embed_positions(position_ids).to(hidden_states.dtype)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), cache if use_cache else None)


class HfkitForCausalLM(HfkitPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head: next-token logits (batch, sequence, vocabulary)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: HfkitConfig):
        super().__init__(config)
        self.model = HfkitModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all), and with `labels` the cross-entropy.

        Labels (batch, sequence) are shifted here; -100 is not predicted. With `num_items_in_batch` the loss is the sum
        over predicted tokens divided by it, so that it does not depend on how a batch is split; without, the mean.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.get(CACHE), outputs.hidden_states, outputs.attentions)


class HfkitForSequenceClassification(HfkitPreTrainedModel):
    """The decoder with a linear classifier on the last token that is not padding: logits (batch, labels)."""

    def __init__(self, config: HfkitConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HfkitModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Logits, and with `labels` the loss of the configuration's `problem_type`.

        Where the padding lies is read from `attention_mask`, else from `pad_token_id`. With `num_items_in_batch` the
        loss is the sum over rows divided by it; without, the mean.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        batch_size, sequence = hidden_states.shape[:2]
        is_token = torch.ones(batch_size, sequence, dtype=torch.bool, device=hidden_states.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            is_token = attention_mask.bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        last = (torch.arange(sequence, device=hidden_states.device) * is_token).argmax(-1)  # (batch,)
        logits = self.score(hidden_states[torch.arange(batch_size, device=last.device), last])

        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
            # The cross-entropy of single labels has divided already; the other two losses are means.
            if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / num_items_in_batch
        return SequenceClassifierOutputWithPast(
            loss, logits, outputs.get(CACHE), outputs.hidden_states, outputs.attentions
        )


__all__ = ["HfkitForCausalLM", "HfkitForSequenceClassification", "HfkitModel", "HfkitPreTrainedModel"]
