"""Perplexity and bits per byte, from sums over tokens."""

import math

import numpy as np


def perplexity(sums: np.ndarray) -> dict[str, float]:
    """Return `perplexity` and `bits_per_byte` of the sums of (nats, tokens, bytes)."""
    nats, tokens, size = sums
    return {
        "perplexity": math.exp(min(nats / max(tokens, 1), 700)),
        "bits_per_byte": nats / math.log(2) / max(size, 1),
    }
