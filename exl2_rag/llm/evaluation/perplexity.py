"""Perplexity: e to the mean negative log-probability that a model gives each token of a text after those before it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import SettingsError
from exl2_rag.llm.api import ExL2LLM
from exl2_rag.llm.evaluation.corpus import EvaluationText
from exl2_rag.llm.evaluation.windows import Window, check_sizes, sliding_windows
from exl2_rag.llm.lora.choice import Lora
from exl2_rag.llm.prompt_logprobs import PromptLogprobs

DEFAULT_LENGTH = 2048
Progress = Callable[[int, int], None]
"""Called with the tokens scored so far and in all."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a model made of a text. Logarithms are natural.

    Attributes:
        n_tokens: tokens scored.
        n_windows: windows they lay in.
        mean_nll: mean negative log-probability of a token.
        perplexity: e to that.
        standard_error: of the perplexity, by the spread of single tokens, as llama.cpp gives it; tokens of one text
            hang together, so the true one is larger. None for a single token.
        seconds: of computing, without reading and tokenising.
        length, stride: of the windows.
        window_nlls: mean negative log-probability and tokens of each window, for intervals by window.
    """

    n_tokens: int
    n_windows: int
    mean_nll: float
    perplexity: float
    standard_error: float | None
    seconds: float
    length: int
    stride: int
    window_nlls: tuple[tuple[float, int], ...]

    @property
    def tokens_per_s(self) -> float:
        """Tokens scored in a second."""
        return self.n_tokens / self.seconds if self.seconds else math.inf


def text_windows(
    llm: ExL2LLM, texts: Iterable[EvaluationText], *, length: int | None, stride: int | None, limit: int | None = None
) -> tuple[list[Window], int, int]:
    """The windows of texts for a model, with the length and stride that were chosen.

    Args:
        length: tokens of a window; default: 2,048, or what the engine takes.
        stride: default: the length, so that windows do not overlap.
        limit: tokens scored at most; default: all.

    Raises:
        SettingsError: sizes that do not go, or texts without a token to score.
    """
    length = min(DEFAULT_LENGTH, llm.max_seq_len) if length is None else length
    stride = length if stride is None else stride
    check_sizes(length, stride)
    if length > llm.max_seq_len:
        raise SettingsError(f"length {length} is more than the {llm.max_seq_len} tokens that the model's engine takes")
    bos = llm.tokenizer.bos_token_id if llm.tokenizer.adds_bos else None
    windows: list[Window] = []
    left = math.inf if limit is None else limit
    for text in texts:
        for window in sliding_windows(llm.tokenizer.encode(text.text), length, stride, bos=bos):
            if left <= 0:
                break
            kept = int(min(window.n_scored, left))
            windows.append(Window(window.token_ids[: window.first_scored + kept], window.first_scored))
            left -= kept
    if not windows:
        raise SettingsError("the texts have no token to score; give a longer text, or a limit of at least 1")
    return windows, length, stride


def measure_perplexity(
    llm: ExL2LLM,
    texts: Iterable[EvaluationText],
    *,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    lora: Lora | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Perplexity:
    """The perplexity of texts, each window computed anew.

    Args:
        length, stride, limit: see `text_windows`. Where the tokenizer adds BOS, every window begins with one.

    Raises:
        SettingsError: see `text_windows`.
        EngineError: the engine could not finish.
    """
    windows, length, stride = text_windows(llm, texts, length=length, stride=stride, limit=limit)
    total = sum(window.n_scored for window in windows)
    sums: list[tuple[float, float, int]] = []  # of nll, of its square, and tokens, for each window
    done = 0
    started = time.perf_counter()
    for window in windows:
        nlls = _window_nlls(llm, window, lora)
        sums.append((float(nlls.sum()), float(nlls.square().sum()), len(nlls)))
        done += len(nlls)
        progress(done, total)
    seconds = time.perf_counter() - started
    mean = math.fsum(one for one, _, _ in sums) / total
    variance = max(0.0, math.fsum(one for _, one, _ in sums) / total - mean**2)
    perplexity = math.exp(mean)
    return Perplexity(
        n_tokens=total,
        n_windows=len(windows),
        mean_nll=mean,
        perplexity=perplexity,
        standard_error=perplexity * math.sqrt(variance / (total - 1)) if total > 1 else None,
        seconds=seconds,
        length=length,
        stride=stride,
        window_nlls=tuple((one / count, count) for one, _, count in sums),
    )


def _window_nlls(llm: ExL2LLM, window: Window, lora: Lora | None) -> Tensor:
    """Negative log-probabilities [n_scored] float64 of a window's scored tokens."""
    found = PromptLogprobs(window.token_ids, first=window.first_scored)
    llm.each_logits(window.token_ids, found.receive, first_row=found.first_row, lora=lora)
    return -torch.tensor(found.values(), dtype=torch.float64)
