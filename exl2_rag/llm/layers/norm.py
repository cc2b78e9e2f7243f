"""Root-mean-square norm: x / sqrt(mean(x²) + eps) * weight, in float32 whatever the file holds."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.layers.linear import check_shape


class RMSNorm:
    """`weight` is [C] float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[T, C] float32 to [T, C] float32."""
        return ops.rms_norm(x, self.weight, self.eps)


def load_norm(checkpoint: Checkpoint, key: str, *, width: int, eps: float, device: torch.device) -> RMSNorm:
    """Read the norm `<key>.weight`.

    Raises:
        CheckpointError: it is missing, or has another shape or no floating-point dtype.
    """
    name = f"{key}.weight"
    check_shape(checkpoint, name, (width,))
    weight = checkpoint.tensor(name)
    if not weight.is_floating_point():
        raise CheckpointError(f"tensor '{name}' must be floating point, it is {weight.dtype}")
    return RMSNorm(weight.to(device, torch.float32), eps)
