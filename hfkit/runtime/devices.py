"""What the machine can do, measured: the roof that a training speed is held against."""

import time

import torch


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product: the best of several, in about a
    second."""
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


def has_bf16(device: torch.device) -> bool:
    """Return whether it is a GPU, and one that multiplies bfloat16 itself."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return is_there and torch.cuda.is_bf16_supported(including_emulation=False)


def fastest_precision(device: torch.device) -> tuple[str, float]:
    """Return `bf16` where the hardware multiplies it faster than fp32, else `fp32`; and the measured FLOP/s of that.

    A processor may have bf16 instructions and be slower with them, so on a CPU both are measured.
    """
    if has_bf16(device):
        return "bf16", matmul_flops(device, torch.bfloat16)
    flops = {"fp32": matmul_flops(device, torch.float32)}
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        flops["bf16"] = matmul_flops(device, torch.bfloat16)
    best = max(flops, key=lambda name: flops[name])
    return best, flops[best]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
