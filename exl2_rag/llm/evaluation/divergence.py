"""How far a model is from another on a text: Kullback-Leibler divergence of its predictions, and how often they agree.

Both read the same windows. A slice of rows is computed by one model, then by the other, which finds what came before in
its cache (reuse is exact to the bit), so no more than one slice of logits of each is held.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import SettingsError
from exl2_rag.llm.api import ExL2LLM
from exl2_rag.llm.evaluation.corpus import EvaluationText
from exl2_rag.llm.evaluation.perplexity import DEFAULT_LENGTH, Progress, text_windows
from exl2_rag.llm.evaluation.windows import Window
from exl2_rag.llm.prompt_logprobs import ROWS_AT_A_TIME

SLICE_ROWS = 256
"""Rows of logits of each model that are held: with 128k tokens of vocabulary 128 MiB."""

TOP = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """Means over the scored tokens of one window: what pairs up when two comparisons are compared."""

    n_tokens: int
    mean_kl: float
    top1_agreement: float
    nll: float
    other_nll: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How a model differs from the one it is measured against. Nats; natural logarithms.

    Attributes:
        n_tokens: places compared.
        mean_kl: mean of KL(P || Q), P the reference model, Q the other.
        kl_standard_error: of that mean, by the spread between windows (at least two), which hang together less than
            tokens do; None with one.
        kl_p50, kl_p95, kl_p99, kl_max: quantiles over places.
        top1_agreement: share of places where both find the same token most likely.
        top5_agreement: mean share of the reference's five most likely tokens among the other's five.
        perplexity, other_perplexity: of the reference and of the other, on the tokens scored.
        segments: the same by window.
        seconds: of computing.
    """

    n_tokens: int
    mean_kl: float
    kl_standard_error: float | None
    kl_p50: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float
    perplexity: float
    other_perplexity: float
    segments: tuple[Segment, ...]
    seconds: float
    length: int
    stride: int

    @property
    def tokens_per_s(self) -> float:
        """Places compared in a second, by both models together."""
        return self.n_tokens / self.seconds if self.seconds else math.inf


@dataclass(frozen=True, slots=True)
class RowComparison:
    """Of R places, each [R] float64: the divergence, agreements, and negative log-probabilities of the next token."""

    kl: Tensor
    top1: Tensor
    top5: Tensor
    nll: Tensor
    other_nll: Tensor


def compare_rows(rows: Tensor, other_rows: Tensor, token_ids: Tensor) -> RowComparison:
    """Compare logits [R, V] float32 of two models; `token_ids` [R] are the tokens that follow."""
    pieces = [slice(start, start + ROWS_AT_A_TIME) for start in range(0, len(rows), ROWS_AT_A_TIME)]
    parts = [_compare(rows[piece], other_rows[piece], token_ids[piece]) for piece in pieces]
    return RowComparison(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _compare(rows: Tensor, other_rows: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = rows.double().log_softmax(dim=-1), other_rows.double().log_softmax(dim=-1)
    probabilities = log_p.exp()
    # Where p is 0 (logits of -inf) the term is 0, not 0 * inf.
    terms = torch.where(probabilities > 0, probabilities * (log_p - log_q), 0.0)
    k = min(TOP, rows.shape[1])
    best, other_best = rows.topk(k).indices, other_rows.topk(k).indices
    shared = (best[:, :, None] == other_best[:, None, :]).any(dim=2).double().mean(dim=1)
    top1 = (rows.argmax(dim=1) == other_rows.argmax(dim=1)).double()
    nlls = [-one.gather(1, token_ids[:, None])[:, 0] for one in (log_p, log_q)]
    return terms.sum(dim=-1).clamp_min(0), top1, shared, *nlls


def check_same_tokenizer(llm: ExL2LLM, other: ExL2LLM) -> None:
    """Refuse two models whose token ids do not mean the same.

    Raises:
        SettingsError: they differ; the message says in what.
    """
    mine, its = llm.tokenizer.vocabulary(), other.tokenizer.vocabulary()
    if mine != its:
        different = sorted({*mine.items()} ^ {*its.items()}, key=lambda one: one[1])
        raise SettingsError(
            f"{llm.model_name} and {other.model_name} have different tokenizers ({len(mine)} and {len(its)} tokens, "
            f"{len(different)} entries differ, such as {different[0][0]!r}); only models of one tokenizer compare"
        )
    if llm.config.vocab_size != other.config.vocab_size:
        raise SettingsError(
            f"{llm.model_name} gives {llm.config.vocab_size} logits and {other.model_name} {other.config.vocab_size}; "
            "only models of one vocabulary compare"
        )


def measure_divergence(
    llm: ExL2LLM,
    other: ExL2LLM,
    texts: Iterable[EvaluationText],
    *,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Divergence:
    """Compare `other` with the reference `llm` on texts.

    Args:
        length, stride, limit: see `text_windows`; a window must fit both engines.

    Raises:
        SettingsError: other tokenizers, or see `text_windows`.
        EngineError: an engine could not finish.
    """
    check_same_tokenizer(llm, other)
    length = min(DEFAULT_LENGTH, llm.max_seq_len, other.max_seq_len) if length is None else length
    if length > other.max_seq_len:
        raise SettingsError(
            f"length {length} is more than the {other.max_seq_len} tokens that {other.model_name} takes"
        )
    windows, length, stride = text_windows(llm, texts, length=length, stride=stride, limit=limit)
    total = sum(window.n_scored for window in windows)
    kls: list[Tensor] = []
    top5, nlls, segments = [], [], []
    done = 0
    started = time.perf_counter()
    for window in windows:
        pieces = []
        for piece in _window_pieces(llm, other, window):
            pieces.append(piece)
            done += len(piece.kl)
            progress(done, total)
        joined = RowComparison(
            *(torch.cat([getattr(piece, name) for piece in pieces]) for name in RowComparison.__slots__)
        )
        kls.append(joined.kl)
        top5.append(float(joined.top5.sum()))
        nlls.append((float(joined.nll.sum()), float(joined.other_nll.sum())))
        means = (float(getattr(joined, name).mean()) for name in ("kl", "top1", "nll", "other_nll"))
        segments.append(Segment(len(joined.kl), *means))
    seconds = time.perf_counter() - started
    every_kl = torch.cat(kls)
    # torch.quantile refuses more than 2^24 values; sorting does not.
    ordered = every_kl.sort().values
    p50, p95, p99 = (float(ordered[min(len(ordered) - 1, int(len(ordered) * share))]) for share in (0.5, 0.95, 0.99))
    return Divergence(
        n_tokens=total,
        mean_kl=float(every_kl.mean()),
        kl_standard_error=mean_standard_error([(one.mean_kl, one.n_tokens) for one in segments]),
        kl_p50=p50,
        kl_p95=p95,
        kl_p99=p99,
        kl_max=float(ordered[-1]),
        top1_agreement=math.fsum(one.top1_agreement * one.n_tokens for one in segments) / total,
        top5_agreement=math.fsum(top5) / total,
        perplexity=math.exp(math.fsum(one for one, _ in nlls) / total),
        other_perplexity=math.exp(math.fsum(one for _, one in nlls) / total),
        segments=tuple(segments),
        seconds=seconds,
        length=length,
        stride=stride,
    )


def mean_standard_error(segments: Iterable[tuple[float, int]]) -> float | None:
    """Standard error of a mean over tokens, from (mean, tokens) of segments that are taken to be independent.

    For a paired difference of two comparisons on the same segments, give the differences of their means. None for fewer
    than two segments.
    """
    parts = list(segments)
    if len(parts) < 2:
        return None
    total = sum(count for _, count in parts)
    mean = math.fsum(value * count for value, count in parts) / total
    squares = math.fsum((count * (value - mean)) ** 2 for value, count in parts)
    return math.sqrt(squares * len(parts) / (len(parts) - 1)) / total


def _window_pieces(llm: ExL2LLM, other: ExL2LLM, window: Window) -> Iterator[RowComparison]:
    last = len(window.token_ids) - 1  # its own logits predict nothing that is known
    for first in range(window.first_scored - 1, last, SLICE_ROWS):
        end = min(first + SLICE_ROWS, last)
        rows, other_rows = (_rows(one, window.token_ids[:end], first) for one in (llm, other))
        yield compare_rows(rows, other_rows, torch.tensor(window.token_ids[first + 1 : end + 1]))


def _rows(llm: ExL2LLM, token_ids: tuple[int, ...], first_row: int) -> Tensor:
    """Logits [rows, V] float32 after each of the tokens from `first_row` on."""
    slices: list[Tensor] = []
    llm.each_logits(token_ids, lambda _first, rows: slices.append(rows.cpu()), first_row=first_row)
    return torch.cat(slices)
