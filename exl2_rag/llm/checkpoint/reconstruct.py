"""The exact weights of a quantised layer, for tests, evaluation and conversion. Inference never calls this."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import exl2_format, gptq_format


def layer_parts(tensors: Mapping[str, Tensor], key: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of `<key>.<name>` that exist, under their short names."""
    return {name: tensors[f"{key}.{name}"] for name in names if f"{key}.{name}" in tensors}


def reconstruct(
    tensors: Mapping[str, Tensor], key: str, *, prescale: float = 1.0, checkpoint_format: str | None = None
) -> Tensor:
    """The weights of one quantised layer, bit for bit what the format defines.

    Args:
        tensors: holds `<key>.q_weight` and its fellows (EXL2), or `<key>.qweight` and its fellows (GPTQ).
        key: the layer, such as "model.layers.0.self_attn.q_proj".
        prescale: a constant of the layer that multiplies its weights.
        checkpoint_format: that of `quantization_config`; matters for GPTQ only.

    Returns:
        [K, N] float16 in the order of the inputs, padded columns included, bias not applied.

    Raises:
        CheckpointError: the tensors are absent or not one matrix.
    """
    if f"{key}.q_weight" in tensors:
        return exl2_format.decode(layer_parts(tensors, key, exl2_format.PARTS), key, prescale=prescale)
    if f"{key}.qweight" in tensors:
        parts = layer_parts(tensors, key, (*gptq_format.PARTS, "g_idx"))
        return gptq_format.decode(parts, key, prescale=prescale, checkpoint_format=checkpoint_format)
    raise CheckpointError(
        f"there is no quantised layer '{key}': expected {key}.q_weight (EXL2) or {key}.qweight (GPTQ)"
    )
