"""Token embedding: the table stays in the dtype of the file, the rows that are looked up become float32."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.layers.linear import check_shape

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Embedding:
    """A table [V, hidden_size]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weight.nbytes

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] int64 to [T, hidden_size] float32."""
        return ops.embedding(self.weight, token_ids)


def load_embedding(
    checkpoint: Checkpoint, key: str, *, vocab_size: int, hidden_size: int, device: torch.device
) -> Embedding:
    """Read the table `<key>.weight`.

    Raises:
        CheckpointError: it is missing, or has another shape or dtype.
    """
    name = f"{key}.weight"
    check_shape(checkpoint, name, (vocab_size, hidden_size))
    weight = checkpoint.tensor(name)
    if weight.dtype not in _FLOATS:
        raise CheckpointError(f"tensor '{name}' must be float32, float16 or bfloat16, it is {weight.dtype}")
    return Embedding(weight.to(device).contiguous())
