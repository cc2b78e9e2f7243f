"""A plain Llama decoder for training, in float32 torch, with the names Hugging Face checkpoints use.

Several questions about the same documents share one row: a token sees the tokens of its own branch and of the branches
that lead to it, never a sibling's. Knows nothing of text.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 512
    n_layers: int = 5
    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1e7
    norm_eps: float = 1e-5
    max_positions: int = 2048

    def hf_config(self, *, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The config.json of a Llama checkpoint of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.max_positions,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "float16",
        }

    def as_dict(self) -> dict[str, Any]:
        """The sizes as plain data."""
        return asdict(self)


class Attention(nn.Module):
    """Rotary grouped-query attention under a mask that is given."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, q_width = shape.hidden_size, shape.n_heads * shape.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, shape.n_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.n_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(q_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, C] -> [B, S, C]. cos, sin [B, 1, S, D]; mask [B, 1, S, S] float, added to the scores."""
        B, S, _ = x.shape
        D = self.shape.head_dim
        q = self.q_proj(x).view(B, S, -1, D).transpose(1, 2)
        k = self.k_proj(x).view(B, S, -1, D).transpose(1, 2)
        v = self.v_proj(x).view(B, S, -1, D).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.shape.n_kv_heads != self.shape.n_heads:
            repeat = self.shape.n_heads // self.shape.n_kv_heads
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, -1))


class Mlp(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., C] -> [..., C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """X [B, S, C] -> [B, S, C]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder with tied embeddings; `head` is applied only where logits are wanted."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        self.output: Tensor | None = None  # [V, C] in place of the embeddings, once these are rounded apart
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_positions), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states after the last norm, [B, S, C], of tokens [B, S] at positions [B, S]."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)  # type: ignore[index]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        return F.linear(hidden, self.embed_tokens.weight if self.output is None else self.output)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def tree_mask(branches: Tensor, visible: Tensor) -> Tensor:
    """The additive mask of rows made of branches.

    Args:
        branches: [B, S] branch number of each token; a branch's tokens are in order, parents before children.
        visible: [B, N, N] bool: may a token of branch n see branch m? True on the diagonal.

    Returns:
        [B, 1, S, S] float, 0 where token i may see token j, -inf elsewhere.
    """
    B, S = branches.shape
    rows = torch.arange(B).view(B, 1, 1)
    allowed = visible[rows, branches.unsqueeze(2), branches.unsqueeze(1)]
    allowed &= torch.ones(S, S, dtype=torch.bool).tril()
    return torch.zeros(B, 1, S, S).masked_fill_(~allowed.unsqueeze(1), -math.inf)
