"""Whether a prompt can be run, and what became of it, as it comes back with the result. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exl2_rag.errors import ContextOverflowError, RequestError

if TYPE_CHECKING:
    from exl2_rag.llm.engine_config import EngineConfig
    from exl2_rag.llm.logprobs import TokenLogprob
    from exl2_rag.llm.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What was left out of a prompt, how likely it is, and whether it left room enough.

    Attributes:
        dropped_messages: places, in the chat that was given, of messages that the overflow policy left out.
        dropped_tokens: tokens that the policy "truncate-left" left out of a plain prompt.
        context_full: the text ended because the context was full, before `max_tokens` was reached.
        logprobs: one for each token of the prompt, if `prompt_logprobs` asked for them; else None.
    """

    dropped_messages: tuple[int, ...] = ()
    dropped_tokens: int = 0
    context_full: bool = False
    logprobs: tuple[TokenLogprob, ...] | None = None


def check_prompt(token_ids: tuple[int, ...], config: EngineConfig, vocab_size: int, *, n_new: int) -> None:
    """Refuse a prompt that can never run.

    Args:
        n_new: tokens that must find room after it.

    Raises:
        RequestError: it is empty, or holds ids outside the vocabulary.
        ContextOverflowError: it is too long.
    """
    if not token_ids:
        raise RequestError("expected a prompt of at least one token, got none; give some text")
    wrong = next((one for one in token_ids if not 0 <= one < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"token ids must be from 0 to {vocab_size - 1}, got {wrong}")
    limit = config.sequence_limit
    if len(token_ids) + n_new > limit:
        of_what = "max_seq_len" if limit == config.max_seq_len else "cache_tokens"
        room = ", the new token included" if n_new else ""
        raise ContextOverflowError(
            f"the prompt has {len(token_ids)} tokens, the limit is {limit} ({of_what}){room}; "
            f"shorten the prompt, have it shortened (overflow=...), or give a larger {of_what}",
            prompt_tokens=len(token_ids),
            limit_tokens=limit,
        )


def final_report(sequence: Sequence, token_text: Callable[[int], str]) -> PromptReport | None:
    """The report of a sequence that has ended; None for one without a continuation."""
    if sequence.prompt_report is None:
        return None
    limit, collector = sequence.sampling.max_tokens, sequence.prompt_logprobs
    is_full = sequence.finish_reason == "length" and (limit is None or sequence.n_new < limit)
    logprobs = None if collector is None else collector.result(token_text)
    return dataclasses.replace(sequence.prompt_report, context_full=is_full, logprobs=logprobs)
