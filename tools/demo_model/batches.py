"""Rows to tensors, rows of like length together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.demo_model.examples import Row
from tools.demo_model.model import tree_mask


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded to S tokens, and M tokens to predict.

    tokens, positions [B, S] i64; mask [B, 1, S, S] f32. predictor [M] i64: where in the B*S positions each is
    predicted; target [M] i64; weight [M] f32; choices [M, X] i64, filled up with -1, the first one -1 for "any
    token"; in_text [M] bool: part of a reply's text.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    predictor: Tensor
    target: Tensor
    weight: Tensor
    choices: Tensor
    in_text: Tensor
    n_questions: int
    n_tokens: int


def collate(rows: Sequence[Row], *, pad: int) -> Batch:
    """One batch of the rows as they are."""
    B, S = len(rows), max(row.n_tokens for row in rows)
    n_branches = max(len(row.branches) for row in rows) + 1
    tokens = torch.full((B, S), pad)
    positions = torch.zeros(B, S, dtype=torch.int64)
    branches = torch.full((B, S), n_branches - 1)  # padding sees padding only
    visible = torch.eye(n_branches, dtype=torch.bool).repeat(B, 1, 1)
    for b, row in enumerate(rows):
        ends: list[int] = []
        for n, (branch, start) in enumerate(zip(row.branches, row.starts, strict=True)):
            stop = start + len(branch.tokens)
            first = ends[branch.parent] if branch.parent >= 0 else 0
            ends.append(first + len(branch.tokens))
            tokens[b, start:stop] = torch.tensor(branch.tokens)
            positions[b, start:stop] = torch.arange(first, first + len(branch.tokens))
            branches[b, start:stop] = n
            if branch.parent >= 0:
                visible[b, n] |= visible[b, branch.parent]
    targets = [(b * S + t.position, t) for b, row in enumerate(rows) for t in row.targets]
    n_choices = max([len(t.choices) for _, t in targets] + [1])
    return Batch(
        tokens,
        positions,
        tree_mask(branches, visible),
        torch.tensor([position for position, _ in targets], dtype=torch.int64),
        torch.tensor([t.token for _, t in targets], dtype=torch.int64),
        torch.tensor([t.weight for _, t in targets]),
        torch.tensor([[*t.choices, *[-1] * (n_choices - len(t.choices))] for _, t in targets], dtype=torch.int64),
        torch.tensor([t.in_text for _, t in targets]),
        sum(row.n_questions for row in rows),
        sum(row.n_tokens for row in rows),
    )


def bucketed(rows: Sequence[Row], *, tokens_per_batch: int, rng: random.Random) -> Iterator[list[Row]]:
    """Cut rows, sorted by length, into batches of at most `tokens_per_batch` padded tokens; in random order."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: row.n_tokens):
        if groups[-1] and row.n_tokens * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    yield from groups
