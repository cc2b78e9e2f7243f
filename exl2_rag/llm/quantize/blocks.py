"""One layer of a float model at a time, run on calibration rows: weights can be exchanged, and inputs overheard.

A layer has two parts, attention and MLP, each with its norm and its residual. Knows layers and hidden states; not what
is measured or decided with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from exl2_rag.errors import CalibrationError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.linear import LinearSpec
from exl2_rag.llm.layers.rotary import Rotary
from exl2_rag.llm.models import tensor_names
from exl2_rag.llm.models.decoder import DecoderLayer
from exl2_rag.llm.models.registry import ModelParts

PartName = Literal["self_attn", "mlp"]

PART_NAMES: Final[tuple[PartName, ...]] = ("self_attn", "mlp")
STAGES: Final[Mapping[PartName, tuple[tuple[str, ...], ...]]] = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}
"""Matrices of a part that read one input, in the order in which the inputs come about."""

_PAGE_SIZE = 256
Listener = Callable[[Tensor], None]


class FloatLinear:
    """A matrix in float32 that multiplies by the machine's own library.

    Attributes:
        weight: [out, in] float32; may be exchanged.
        listener: called with each input [T, in], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.listener: Listener | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activations, *, add_to: Tensor | None = None) -> Tensor:
        """[T, in] float32 to [T, out] float32; with `add_to` added to it in place."""
        if self.listener is not None:
            self.listener(x.x)
        result = functional.linear(x.x, self.weight, self.bias)
        return result if add_to is None else add_to.add_(result)


def load_float_linear(checkpoint: Checkpoint, spec: LinearSpec, device: torch.device) -> FloatLinear:
    """Read the plain matrix `<key>.weight`, and its bias if the model has one there.

    Raises:
        CalibrationError: a number in it is not finite.
    """
    parts = checkpoint.linear(spec.key)
    weight = parts["weight"].to(device, torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"{spec.key}.weight holds numbers that are not finite; the source is damaged")
    return FloatLinear(weight, parts["bias"].to(device, torch.float32) if spec.bias else None)


@dataclass(frozen=True, slots=True)
class PartRun:
    """What running one part needs beside the layer: positions and a cache for the rows of one batch."""

    inputs: ForwardInputs
    rotary: Rotary
    k_pages: Tensor
    v_pages: Tensor


class FloatLayer:
    """One decoder layer of the source model."""

    def __init__(self, index: int, layer: DecoderLayer, matrices: Mapping[PartName, Mapping[str, FloatLinear]]) -> None:
        self.index = index
        self._layer = layer
        self._matrices = matrices

    def matrices(self, part: PartName) -> Mapping[str, FloatLinear]:
        """The matrices of a part by their short names."""
        return self._matrices[part]

    def run(self, part: PartName, hidden: Tensor, run: PartRun) -> None:
        """Apply one part to hidden states [T, hidden_size] float32, in place."""
        layer = self._layer
        if part == "self_attn":
            normed = layer.input_norm(hidden)
            layer.attention(normed, run.inputs, run.rotary, run.k_pages, run.v_pages, add_to=hidden)
        else:
            layer.mlp(layer.mlp_norm(hidden), add_to=hidden)

    @contextmanager
    def listening(self, part: PartName, listeners: Mapping[str, Listener]) -> Iterator[None]:
        """Let matrices of a part hand their inputs to listeners, within the context."""
        matrices = self._matrices[part]
        try:
            for name, listener in listeners.items():
                matrices[name].listener = listener
            yield
        finally:
            for name in listeners:
                matrices[name].listener = None

    @contextmanager
    def exchanged(self, part: PartName, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let matrices of a part have other weights [out, in], within the context."""
        matrices = self._matrices[part]
        kept = {name: matrices[name].weight for name in weights}
        try:
            for name, weight in weights.items():
                matrices[name].weight = weight.to(kept[name].device, torch.float32)
            yield
        finally:
            for name, weight in kept.items():
                matrices[name].weight = weight


class FloatModel:
    """Reads the layers of a float model one by one, and embeds and reads out hidden states.

    Args:
        config: what the model is.
        checkpoint: its tensors.
        length: tokens of a calibration row.
        device: where layers run.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, *, length: int, device: torch.device) -> None:
        self.config = config
        self.length = length
        self.device = device
        self._checkpoint = checkpoint
        self._parts = ModelParts(config, checkpoint, device, "exact", make_linear=self._make_linear)
        self._made: dict[str, FloatLinear] = {}
        self._rotary = Rotary(config.rope, rotary_dim=config.head_dim, max_seq_len=length, device=device)
        pages = -(-length // _PAGE_SIZE)
        self._page_table = torch.arange(pages, dtype=torch.int32)
        shape = (pages, _PAGE_SIZE, config.n_kv_heads, config.head_dim)
        self._k_pages = torch.zeros(shape, dtype=torch.float32, device=device)
        self._v_pages = torch.zeros(shape, dtype=torch.float32, device=device)

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.config.n_layers

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 to [T, hidden_size] float32; a token beyond the table is token 0."""
        ids = torch.where(token_ids < self.config.vocab_size, token_ids, 0)
        return self._parts.embedding()(ids.to(self.device))

    def layer(self, index: int) -> FloatLayer:
        """Read one layer into memory."""
        self._made = {}
        layer = self._parts.layer(index)
        made = self._made
        specs = {
            "self_attn": tensor_names.attention_specs(self.config, index),
            "mlp": tensor_names.mlp_specs(self.config, index),
        }
        matrices = {
            cast(PartName, part): {name: made[spec.key] for name, spec in of_part.items()}
            for part, of_part in specs.items()
        }
        return FloatLayer(index, layer, matrices)

    def part_run(self) -> PartRun:
        """Positions and a cache for one row of `length` tokens."""
        inputs = ForwardInputs.single(
            torch.zeros(self.length, dtype=torch.int64), start=0, pages=self._page_table, page_size=_PAGE_SIZE
        )
        on_device = dataclasses.replace(
            inputs,
            token_ids=inputs.token_ids.to(self.device),
            positions=inputs.positions.to(self.device),
            slot_mapping=inputs.slot_mapping.to(self.device),
            page_table=inputs.page_table.to(self.device),
            query_starts=inputs.query_starts.to(self.device),
            context_lens=inputs.context_lens.to(self.device),
        )
        return PartRun(on_device, self._rotary, self._k_pages, self._v_pages)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The head's input [T, hidden_size] for hidden states of that shape."""
        return self._parts.norm(tensor_names.FINAL_NORM_KEY)(hidden)

    def head_weight(self) -> Tensor:
        """[V, hidden_size] floating point: the output head, which may be the embedding."""
        spec = tensor_names.head_spec(self.config, self._checkpoint)
        key = tensor_names.EMBEDDING_KEY if spec is None else spec.key
        return self._checkpoint.tensor(f"{key}.weight").to(self.device)

    def _make_linear(self, spec: LinearSpec) -> FloatLinear:
        linear = self._made[spec.key] = load_float_linear(self._checkpoint, spec, self.device)
        return linear
