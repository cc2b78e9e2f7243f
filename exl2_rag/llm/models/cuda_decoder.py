"""The decoder on CUDA: the same computation as `decoder.py`, cut into the launches that suit a card.

    h = embedding(tokens)                                                float32, as everywhere
    each layer:  q, k, v = qkv(norm(h));  q = rope_cache_write(q, k, v)
                 h += o(paged_attention(q))                              added by the product itself
                 gate, up = gate_up(norm(h));  h += down(silu(gate) * up)
    logits = head(norm(h))                                               only for the rows that are asked for

Between the products activations are float16 (precision "fast") or float32 ("exact"). Ten launches a layer; none of them
waits for the card, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError, SettingsError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kernels import cuda_attention, cuda_prefill, cuda_small_ops
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import Scoring
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.layers.cuda_linear import CudaLinear, PlainLinear, as_activation_dtype, load_cuda_linear
from exl2_rag.llm.layers.embedding import load_embedding
from exl2_rag.llm.layers.linear import LinearSpec
from exl2_rag.llm.layers.norm import RMSNorm, load_norm
from exl2_rag.llm.layers.rotary import Rotary
from exl2_rag.llm.models import tensor_names

ACTIVATION_DTYPES: Final = {"fast": torch.float16, "exact": torch.float32}


@dataclass(frozen=True, slots=True)
class CudaLayer:
    """One layer's weights; `sliding_window` is how many keys a token sees, 0 for all."""

    input_norm: RMSNorm
    qkv: CudaLinear
    o_proj: CudaLinear
    mlp_norm: RMSNorm
    gate_up: CudaLinear
    down_proj: CudaLinear
    sliding_window: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        parts = (self.input_norm, self.qkv, self.o_proj, self.mlp_norm, self.gate_up, self.down_proj)
        return sum(part.weight_bytes for part in parts)


class CudaDecoder:
    """A loaded model. `forward` changes nothing but the pages it is given; calls must not overlap on one cache.

    Attributes:
        config: what the model is.
        max_seq_len: positions the rotary tables reach; no token may stand beyond.
        dtype: of activations.
        deterministic: no row's bits depend on what else is computed with it.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        dtype: torch.dtype,
        deterministic: bool = False,
        embedding: Tensor,
        layers: Sequence[CudaLayer],
        norm: RMSNorm,
        head: CudaLinear,
        rotary: Rotary,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.deterministic = deterministic
        self.max_seq_len = rotary.cos.shape[0]
        self.layers = tuple(layers)
        self._backend = backend
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._rotary = rotary

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights hold; a table shared by embedding and head counts once."""
        shared = isinstance(self._head, PlainLinear) and self._head.weight is self._embedding
        ends = self._norm.weight_bytes + self._head.weight_bytes + (0 if shared else self._embedding.nbytes)
        return ends + sum(layer.weight_bytes for layer in self.layers)

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """Compute the new tokens of a step and write their keys and values into the cache.

        Args:
            inputs: T new tokens of B sequences; L of their rows need logits. A token whose slot is negative is
                computed, but not written (padding).
            cache: pages of this model's size, on its device.

        Returns:
            [L, V] float32, unnormalised.

        Raises:
            KernelError: inputs or cache do not fit the model, or the card cannot run it.
        """
        hidden = cuda_small_ops.embedding(self._backend, self._embedding, inputs.token_ids)
        for layer, k_pages, v_pages in zip(self.layers, cache.k_pages, cache.v_pages, strict=True):
            self._attend(layer, hidden, inputs, k_pages, v_pages)
            gate, up = layer.gate_up(self._normed(layer.mlp_norm, hidden))
            layer.down_proj.add_to(hidden, cuda_small_ops.gated_activation(self._backend, "silu", gate, up))
        rows = hidden if inputs.logit_rows is None else hidden.index_select(0, inputs.logit_rows)
        if rows.shape[0] == 0:
            return rows.new_empty((0, self.config.vocab_size))
        return self._head(self._normed(self._norm, rows), torch.float32)[0]

    def _normed(self, norm: RMSNorm, hidden: Tensor) -> Tensor:
        return cuda_small_ops.rms_norm(self._backend, hidden, norm.weight, norm.eps, self.dtype)

    def _attend(
        self,
        layer: CudaLayer,
        hidden: Tensor,
        inputs: ForwardInputs,
        k_pages: Tensor | QuantisedPages,
        v_pages: Tensor | QuantisedPages,
    ) -> None:
        """hidden += the attention of the layer."""
        head_dim = self.config.head_dim
        q, k, v = (
            part.view(part.shape[0], part.shape[1] // head_dim, head_dim)
            for part in layer.qkv(self._normed(layer.input_norm, hidden))
        )
        place = (self._rotary.cos, self._rotary.sin, inputs.positions, inputs.slot_mapping)
        if isinstance(k_pages, QuantisedPages) and isinstance(v_pages, QuantisedPages):
            q = cuda_attention.quantise_kv_write(self._backend, q, k, v, *place, k_pages, v_pages)
        else:
            assert isinstance(k_pages, Tensor)
            assert isinstance(v_pages, Tensor)
            q = cuda_small_ops.rope_cache_write(self._backend, q, k, v, *place, k_pages, v_pages)
        scoring, lengths = Scoring(self.config.softmax_scale, layer.sliding_window), inputs.lengths
        # "exact" keeps to our kernel, which gives a row the same bits however its prompt is cut into slices.
        may_use_library = self.dtype == torch.float16 and not self.deterministic
        if may_use_library and lengths is not None and lengths.longest_slice >= cuda_prefill.MIN_ROWS:
            mixed = cuda_prefill.paged_attention(
                self._backend,
                q,
                k_pages,
                v_pages,
                inputs.batch,
                scoring,
                host_starts=lengths.query_starts,
                host_contexts=lengths.context_lens,
                min_rows=cuda_prefill.MIN_ROWS,
            )
        else:
            mixed = cuda_attention.paged_attention(self._backend, q, k_pages, v_pages, inputs.batch, scoring)
        layer.o_proj.add_to(hidden, mixed.flatten(1))


def load_cuda_model(
    model_dir: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    backend: Backend,
    *,
    device: torch.device,
    max_seq_len: int,
    precision: str = "fast",
    deterministic: bool = False,
) -> CudaDecoder:
    """Check a checkpoint against the config, then read and prepare all its weights; as `registry.load_model`.

    Args:
        backend: runs the kernels, on tensors of `device`.
        precision: "fast" (float16 activations) or "exact" (float32).
        deterministic: keep to kernels that give a row the same bits whatever else is computed with it; long prompts
            take longer.

    Raises:
        CheckpointError: a tensor is missing, misshapen, damaged, or belongs to no part of the model.
        SettingsError: `max_seq_len` is not positive.
    """
    if max_seq_len < 1:
        raise SettingsError(f"max_seq_len must be at least 1, got {max_seq_len}")
    loader = _Loader(config, checkpoint, backend, device, ACTIVATION_DTYPES[precision], library=not deterministic)
    try:
        tensor_names.check_tensors(config, checkpoint)
        table = loader.embedding()
        return CudaDecoder(
            config,
            backend,
            dtype=ACTIVATION_DTYPES[precision],
            deterministic=deterministic,
            embedding=table,
            layers=[loader.layer(index) for index in range(config.n_layers)],
            norm=loader.norm(tensor_names.FINAL_NORM_KEY),
            head=loader.head(table),
            rotary=Rotary(config.rope, rotary_dim=config.head_dim, max_seq_len=max_seq_len, device=device),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{model_dir}: {error}") from error


class _Loader:
    """Reads the parts of one model."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        *,
        library: bool,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._backend = backend
        self._device = device
        self._dtype = dtype
        self._library = library

    def embedding(self) -> Tensor:
        config = self._config
        table = load_embedding(
            self._checkpoint,
            tensor_names.EMBEDDING_KEY,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            device=self._device,
        ).weight
        # A table that is the head as well is brought into the head's dtype, so that it is in memory once.
        is_head = tensor_names.head_spec(config, self._checkpoint) is None
        return as_activation_dtype(table, self._dtype) if is_head else table.contiguous()

    def norm(self, key: str) -> RMSNorm:
        config = self._config
        return load_norm(self._checkpoint, key, width=config.hidden_size, eps=config.norm_eps, device=self._device)

    def linear(self, *specs: LinearSpec) -> CudaLinear:
        return load_cuda_linear(
            self._checkpoint,
            specs,
            self._backend,
            device=self._device,
            dtype=self._dtype,
            gptq_format=self._config.gptq_format,
            library=self._library,
        )

    def head(self, table: Tensor) -> CudaLinear:
        spec = tensor_names.head_spec(self._config, self._checkpoint)
        return PlainLinear(self._backend, table, None, self._library) if spec is None else self.linear(spec)

    def layer(self, index: int) -> CudaLayer:
        attention = tensor_names.attention_specs(self._config, index)
        mlp = tensor_names.mlp_specs(self._config, index)
        return CudaLayer(
            input_norm=self.norm(tensor_names.input_norm_key(index)),
            qkv=self.linear(attention["q_proj"], attention["k_proj"], attention["v_proj"]),
            o_proj=self.linear(attention["o_proj"]),
            mlp_norm=self.norm(tensor_names.mlp_norm_key(index)),
            gate_up=self.linear(mlp["gate_proj"], mlp["up_proj"]),
            down_proj=self.linear(mlp["down_proj"]),
            sliding_window=self._config.sliding_windows[index],
        )
