"""Causal self-attention over the paged KV cache, with grouped queries and an optional sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import Pages
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.linear import Linear
from exl2_rag.llm.layers.rotary import Rotary


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention. `head_dim` is D; `sliding_window` is how many keys a token sees, 0 for all."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    head_dim: int
    softmax_scale: float
    sliding_window: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.weight_bytes for part in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))

    def __call__(
        self,
        x: Tensor,
        inputs: ForwardInputs,
        rotary: Rotary,
        k_pages: Pages,
        v_pages: Pages,
        *,
        add_to: Tensor,
    ) -> None:
        """Write the new tokens' keys and values into the pages, then attend to everything up to each token.

        Args:
            x: [T, hidden_size] float32, normed.
            inputs: where the tokens stand, and which pages their sequences have.
            rotary: at least as many positions as any in `inputs`.
            k_pages, v_pages: [P, PS, KH, D] of this layer, plain or quantised; written to.
            add_to: [T, hidden_size] float32; the result is added to it.
        """
        normed = Activations(x, inputs.token_lora)
        q, k, v = (self._heads(one(normed)) for one in (self.q_proj, self.k_proj, self.v_proj))
        place = (rotary.cos, rotary.sin, inputs.positions, inputs.slot_mapping)
        if isinstance(k_pages, QuantisedPages) and isinstance(v_pages, QuantisedPages):
            queries = ops.quantise_kv_write(q, k, v, *place, k_pages, v_pages)
        else:
            assert isinstance(k_pages, Tensor)
            assert isinstance(v_pages, Tensor)
            queries = ops.rope_cache_write(q, k, v, *place, k_pages, v_pages)
        del normed, q, k, v  # of a long prompt worth freeing
        scoring = ops.Scoring(self.softmax_scale, self.sliding_window)
        mixed = ops.paged_attention(queries, k_pages, v_pages, inputs.batch, scoring)
        self.o_proj(Activations(mixed.flatten(1), inputs.token_lora), add_to=add_to)

    def _heads(self, x: Tensor) -> Tensor:
        """[T, n * D] as [T, n, D], without a copy."""
        return x.view(x.shape[0], x.shape[1] // self.head_dim, self.head_dim)
