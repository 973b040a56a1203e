"""What the machine can do, measured: the roof that a training speed is held against."""

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: the best of several, in about a second."""
    size = 2048 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)  # what else runs on the machine makes some slower, none faster


def fastest_precision(device: torch.device) -> tuple[str, float]:
    """`bf16` where the hardware multiplies it faster than fp32, else `fp32`; and the measured FLOP/s of that.

    A processor may have bf16 instructions and be slower with them, so on a CPU both are measured.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", matmul_flops(device, torch.bfloat16)
    flops = {"fp32": matmul_flops(device, torch.float32)}
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        flops["bf16"] = matmul_flops(device, torch.bfloat16)
    best = max(flops, key=lambda name: flops[name])
    return best, flops[best]


def training_flops_per_token(model: "PreTrainedModel", sequence_length: int) -> float:
    """Forward and backward: 6 per trained weight that multiplies, 4 per frozen one, and 12 * layers * width * tokens
    for attention.

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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
