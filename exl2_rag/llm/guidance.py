"""Classifier-free guidance: a request that is computed twice, after its prompt and after a negative one.

The second half is a sequence of its own, the companion: it has the negative prompt, its own pages and place in the
batch, and takes every new token that its leader takes. A token is drawn when the logits of both are there; while they
decode both are planned in one step. The companion is nobody's request: it has no text and ends with its leader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from exl2_rag.errors import ContextOverflowError, RequestError
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor


def negative_ids(params: SamplingParams, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The token ids of the negative prompt; without one, the last token of the prompt, as in transformers.

    Raises:
        RequestError: it is a text or messages, which the engine cannot read.
    """
    negative = params.negative_prompt
    if negative is None:
        return prompt[-1:]
    ids = tuple(one for one in negative if isinstance(one, int))
    if isinstance(negative, str) or len(ids) != len(negative):
        raise RequestError(
            "the engine takes a negative_prompt as token ids; encode it first, or use ExL2LLM, which does"
        )
    return ids


def room_for_two(config: EngineConfig, prompt: tuple[int, ...], negative: tuple[int, ...]) -> int:
    """How many new tokens fit both halves at once.

    Raises:
        RequestError: the batch has one place only.
        ContextOverflowError: not one fits.
    """
    if config.max_batch_size < 2:
        raise RequestError(
            "guidance computes two sequences side by side, and max_batch_size is 1; give at least 2, or leave out "
            "cfg_scale"
        )
    # A page for the partly filled one of each half, and one in reserve.
    in_cache = ((config.n_pages - 3) * config.page_size - len(prompt) - len(negative)) // 2
    room = min(config.sequence_limit - max(len(prompt), len(negative)), in_cache)
    if room < 1:
        n_tokens = len(prompt) + len(negative)
        raise ContextOverflowError(
            f"prompt and negative prompt have {len(prompt)} and {len(negative)} tokens, which leaves no room for new "
            f"ones of both in {config.sequence_limit} tokens each and {config.n_pages} pages of {config.page_size} "
            "together; shorten them or give a larger cache_tokens",
            prompt_tokens=n_tokens,
            limit_tokens=min(2 * config.sequence_limit, config.n_pages * config.page_size),
        )
    return room


def accompany(sequence: Sequence, negative: tuple[int, ...]) -> None:
    """Give a sequence, not queued yet, its companion."""
    companion = Sequence(
        negative,
        max_new_tokens=sequence.max_new_tokens,
        sampling=SamplingParams(speculate=False),  # it draws nothing
        cache_root=sequence.cache_root,
        lora=sequence.lora,
    )
    companion.leader = sequence
    sequence.companion = companion


def when_both_are_there(
    ready: Iterable[tuple[Sequence, Tensor]],
) -> Iterator[tuple[Sequence, Tensor, Tensor | None]]:
    """Each sequence that can draw now, its logits [1, V], and those of its companion, if it has one.

    Logits of a half whose other half is not as far yet are kept.
    """
    for sequence, logits in ready:
        leader = sequence.leader or sequence
        companion = leader.companion
        if companion is None:
            yield sequence, logits, None
            continue
        sequence.kept_logits = logits.clone()  # the next step may write to the same place
        if leader.kept_logits is not None and companion.kept_logits is not None:
            yield leader, leader.kept_logits, companion.kept_logits
            leader.kept_logits = companion.kept_logits = None
