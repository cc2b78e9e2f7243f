"""A model of random weights that copies: the speed of a real one, and text that quotes its prompt.

Two attention layers of a synthetic EXL2 model are set by hand, the others are made to add next to nothing:

    layer 0   three heads fetch what stands one, two and three tokens before (by turning constant queries with RoPE)
    layer 1   one head finds the place whose last three tokens are the present ones, and fetches what came next there

The head of the model reads that token. All matrices keep their sizes and their bits, so a step costs what it costs in
any model of the shape. Wherever the last three tokens occurred before, the model goes on as the text did there.

Source: Olsson et al., "In-context learning and induction heads" (2022).
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from exl2_rag.llm.checkpoint.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.shard_writer import ShardWriter
from exl2_rag.llm.quantize.rtn import quantize_linear_rtn
from exl2_rag.llm.quantize.synthetic import SyntheticShape

ROPE_THETA = 1e30  # all but the first few pairs of dimensions hardly turn, so they compare tokens, not places
N_TURNING = 5  # pairs that turn
N_BACK = 3
CONSTANT = 0.5
STILL_FACTOR = 1e-3  # what is left of the other layers' outputs


class _Layout:
    """Which numbers of the residual stream hold what."""

    def __init__(self, head_dim: int) -> None:
        half = head_dim // 2
        self.free = [*range(N_TURNING, half), *range(half + N_TURNING, head_dim)]  # of a head: dimensions that compare
        self.n_match = len(self.free)
        self.match = slice(0, self.n_match)
        self.token = slice(head_dim, 2 * head_dim)
        self.constant = 2 * head_dim
        self.back = [slice((3 + n) * head_dim, (3 + n) * head_dim + self.n_match) for n in range(N_BACK)]
        self.found = slice((3 + N_BACK) * head_dim, (4 + N_BACK) * head_dim)


def write_copying_model(source_dir: Path, target_dir: Path, shape: SyntheticShape) -> None:
    """Write a model that copies from a synthetic one of this shape, and the same tokenizer.

    Args:
        source_dir: from `write_synthetic_model`; the width must be at least 7 heads.
        target_dir: must not exist.
    """
    checkpoint = Checkpoint.open(source_dir)
    layout = _Layout(shape.head_dim)
    generator = torch.Generator().manual_seed(1)
    match = _unit_rows(shape.vocab, layout.n_match, generator)
    token = _unit_rows(shape.vocab, shape.head_dim, generator)
    replaced = _layers(shape, layout, generator)
    head = torch.zeros(shape.vocab, shape.hidden)
    head[:, layout.found] = 3 * token
    replaced["lm_head"] = head
    with ShardWriter(target_dir) as writer:
        embedding = torch.zeros(shape.vocab, shape.hidden)
        embedding[:, layout.match], embedding[:, layout.token] = match, token
        embedding[:, layout.constant] = CONSTANT
        writer.add("model.embed_tokens.weight", embedding.half())
        for key, weight in replaced.items():
            bits, group_size, shares = ((8, 6), 128, (0.15, 0.85)) if key == "lm_head" else ((8,), 128, (1.0,))
            parts = quantize_linear_rtn(weight, bits=bits, group_size=group_size, proportions=shares)
            for part, tensor in parts.items():
                writer.add(f"{key}.{part}", tensor)
        for name in checkpoint.names():
            key = name.rpartition(".")[0]
            if key in replaced or key == "model.embed_tokens":
                continue
            tensor = checkpoint.tensor(name)
            if name.endswith("norm.weight"):
                tensor = torch.ones_like(tensor)
            elif name.endswith((".o_proj.q_scale_max", ".down_proj.q_scale_max")):
                tensor = (tensor.float() * STILL_FACTOR).half()
            writer.add(name, tensor.clone())
    for path in source_dir.glob("tokenizer*.json"):
        shutil.copy(path, target_dir)
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = ROPE_THETA
    (target_dir / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _layers(shape: SyntheticShape, layout: _Layout, generator: torch.Generator) -> dict[str, Tensor]:
    """[out, in] of the attention matrices of the first two layers. Sizes are for RMS-normed inputs."""
    dim, width, kv_width = shape.head_dim, shape.hidden, shape.kv_heads * shape.head_dim
    turns = [ROPE_THETA ** (-n / (dim // 2)) for n in range(N_TURNING)]
    # Layer 0: 80 of score for each pair that stands right; a token off, the first pair alone loses half of that.
    scale = math.sqrt(width / (2 + CONSTANT**2))
    size = math.sqrt(80 * math.sqrt(dim)) / (CONSTANT * scale)
    q, k, v, o = (torch.zeros(n, m) for n, m in ((width, width), (kv_width, width), (kv_width, width), (width, width)))
    for n, turn in enumerate(turns):
        k[n, layout.constant] = size
        for head in range(N_BACK):
            q[head * dim + n, layout.constant] = size * math.cos((head + 1) * turn)
            q[head * dim + n + dim // 2, layout.constant] = -size * math.sin((head + 1) * turn)
    v[: layout.n_match, layout.match] = torch.eye(layout.n_match) / scale
    for head in range(N_BACK):
        o[layout.back[head], head * dim : head * dim + layout.n_match] = torch.eye(layout.n_match)
    layers = _named(0, q, k, v, o)
    # Layer 1: a score of 25 for each of the last three tokens that agrees; projections keep the three apart.
    scale = math.sqrt(width / (2 + CONSTANT**2 + N_BACK))
    size = math.sqrt(25 * math.sqrt(dim)) / scale
    q, k, v, o = (torch.zeros_like(one) for one in (q, k, v, o))
    now = [layout.match, *layout.back[:-1]]
    for present, before in zip(now, layout.back, strict=True):
        turned = torch.linalg.qr(torch.randn(layout.n_match, layout.n_match, generator=generator))[0] * size
        q[layout.free, present] = turned
        k[layout.free, before] = turned
    v[:dim, layout.token] = torch.eye(dim) / scale
    o[layout.found, :dim] = 4 * torch.eye(dim)
    return layers | _named(1, q, k, v, o)


def _named(layer: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {f"model.layers.{layer}.self_attn.{name}": one for name, one in zip(names, (q, k, v, o), strict=True)}


def _unit_rows(n_rows: int, width: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n_rows, width, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)
