"""Rotary positions: the tables of cosines and sines that queries and keys are turned by.

Frequencies and angles are computed in float32 in the order transformers does, because the models were trained with
those roundings: at position 100,000 a frequency that is right to the last bit of float64 gives other angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exl2_rag.llm.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> Tensor:
    """[R/2] float32: radians a token by which each pair of numbers turns.

    Args:
        rope: base and scaling.
        rotary_dim: R, how many numbers of a head are turned.

    Source of "llama3": as published with Llama 3.1. Pairs that turn more than `high_freq_factor` times within the
    original context are kept, those that turn less than `low_freq_factor` times are slowed down by `factor`, and those
    between are mixed.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = rope.original_max_seq_len / wavelengths
        kept_share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        mixed = (1 - kept_share) * frequencies / rope.factor + kept_share * frequencies
        slowed = wavelengths > rope.original_max_seq_len / rope.low_freq_factor
        kept = wavelengths < rope.original_max_seq_len / rope.high_freq_factor
        return torch.where(kept, frequencies, torch.where(slowed, frequencies / rope.factor, mixed))
    return frequencies


class Rotary:
    """`cos` and `sin`, each [S, R/2] float32, a row for each position of a sequence."""

    def __init__(self, rope: RopeConfig, *, rotary_dim: int, max_seq_len: int, device: torch.device) -> None:
        frequencies = inverse_frequencies(rope, rotary_dim)
        angles = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequencies
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)
