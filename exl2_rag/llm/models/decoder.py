"""The decoder: token ids in, logits out. One class for every architecture of the table.

    h = embedding(tokens)
    each layer:  h += attention(norm(h));  h += mlp(norm(h))
    logits = head(norm(h))            only for the rows that are asked for

The residual stream h is float32. Knows tensors and layers; not files, sequences or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kernels.paged_batch import Pages
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.attention import Attention
from exl2_rag.llm.layers.embedding import Embedding
from exl2_rag.llm.layers.linear import Linear
from exl2_rag.llm.layers.lora import AdaptedLinear
from exl2_rag.llm.layers.mlp import GatedMLP
from exl2_rag.llm.layers.norm import RMSNorm
from exl2_rag.llm.layers.rotary import Rotary
from exl2_rag.llm.models.tensor_names import EMBEDDING_KEY


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and MLP, each with a norm before it."""

    input_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.weight_bytes for part in (self.input_norm, self.attention, self.mlp_norm, self.mlp))

    def __call__(self, hidden: Tensor, inputs: ForwardInputs, rotary: Rotary, k_pages: Pages, v_pages: Pages) -> None:
        """Adds to `hidden` [T, hidden_size] float32, and writes the new keys and values into the pages."""
        self.attention(self.input_norm(hidden), inputs, rotary, k_pages, v_pages, add_to=hidden)
        self.mlp(self.mlp_norm(hidden), add_to=hidden, lora=inputs.token_lora)


class Decoder:
    """A loaded model. `forward` changes nothing but the pages it is given; calls must not overlap on one cache.

    Attributes:
        config: what the model is.
        max_seq_len: positions the rotary tables reach; no token may stand beyond.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        rotary: Rotary,
    ) -> None:
        self.config = config
        self.max_seq_len = rotary.cos.shape[0]
        self.embedding = embedding
        self.layers = tuple(layers)
        self.norm = norm
        self.head = head
        self.rotary = rotary

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights hold; a table shared by embedding and head counts once."""
        head = self.head.base if isinstance(self.head, AdaptedLinear) else self.head
        shared = self.embedding.weight_bytes if getattr(head, "weight", None) is self.embedding.weight else 0
        ends = self.embedding.weight_bytes + self.norm.weight_bytes + self.head.weight_bytes
        return ends + sum(layer.weight_bytes for layer in self.layers) - shared

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """Compute the new tokens of a step and write their keys and values into the cache.

        Args:
            inputs: T new tokens of B sequences; L of their rows need logits.
            cache: pages of this model's size, on its device.

        Returns:
            [L, V] float32, unnormalised.

        Raises:
            KernelError: inputs or cache do not fit the model.
        """
        hidden = self.embedding(inputs.token_ids)
        if inputs.token_lora is not None:
            inputs.token_lora.add_embedding(hidden, inputs.token_ids, EMBEDDING_KEY)
        for layer, k_pages, v_pages in zip(self.layers, cache.k_pages, cache.v_pages, strict=True):
            layer(hidden, inputs, self.rotary, k_pages, v_pages)
        rows = hidden if inputs.logit_rows is None else hidden.index_select(0, inputs.logit_rows)
        if rows.shape[0] == 0:
            return rows.new_empty((0, self.config.vocab_size))
        return self.head(Activations(self.norm(rows), inputs.logit_lora))
