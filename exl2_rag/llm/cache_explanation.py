"""What a request took from the cache and why no more, in words. No torch.

For whoever runs the engine, not for its tenants: the texts shown are the request's own and that of the nearest cached
prompt of the same salt, but "other identity" tells that another salt has the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from exl2_rag.llm.prefix_trace import SHOWN_TOKENS, MissReason, PrefixTrace

TOKENS_BEFORE = 16
"""Tokens shown before the difference."""

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
_DATE = re.compile(
    rf"\d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}|\d{{1,2}}:\d\d|\b{_MONTH}\.?\s+\d{{1,4}}|\d{{1,2}}\.?\s+{_MONTH}\b|\b{_DAY}\b",
    re.IGNORECASE,
)
_MIN_SHARED_TOKENS = 8  # of two texts, before "the same, but elsewhere" is said

_REASONS: dict[MissReason, str] = {
    "last token": "the whole prompt was cached; its last token is always computed, for its logits",
    "other text": "the nearest cached text goes on differently",
    "never seen": "nothing that is cached goes on from here",
    "evicted": "the text was cached, but has been evicted since",
    "other identity": "the text is cached for another cache_salt or with other adapters only, which are never shared",
    "no room": "the text is cached, but no page was free to copy its rows to",
}


@dataclass(frozen=True, slots=True)
class CacheExplanation:
    """What a prompt took from the cache, and why no more.

    Attributes:
        prompt_tokens: length of the prompt.
        reused_tokens: of these, not computed again: from memory (the pages of the engine), from the RAM tier and from
            the disk; the three add up.
        from_memory, from_ram, from_disk: see `reused_tokens`.
        reason: why the rest was computed; `PrefixTrace` lists the reasons, `why` says it in words.
        differs_at: index of the first token that was not found; None if all were.
        prompt_window: tokens of the prompt around `differs_at`; the first `n_before` of them stand before it.
        cached_window: the nearest cached text there; it agrees in the first `n_before` tokens, and is empty if nothing
            cached goes on from there.
        evicted_tokens: tokens from there on that were cached before they were evicted, as far as that is known.
        hint: a usual cause, if it looks like one: a date, whitespace, a token twice, same parts, other order.
    """

    prompt_tokens: int
    from_memory: int
    from_ram: int
    from_disk: int
    reason: MissReason
    differs_at: int | None
    prompt_window: tuple[int, ...]
    cached_window: tuple[int, ...]
    n_before: int
    evicted_tokens: int
    hint: str | None
    _decode: Callable[[Seq[int]], str] = field(repr=False, compare=False)

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that were not computed again."""
        return self.from_memory + self.from_ram + self.from_disk

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def why(self) -> str:
        """The reason, in words."""
        return _REASONS[self.reason]

    @property
    def prompt_text(self) -> str:
        """The text of `prompt_window`, special tokens included."""
        return self._decode(self.prompt_window)

    @property
    def cached_text(self) -> str:
        """The text of `cached_window`, special tokens included."""
        return self._decode(self.cached_window)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "from_memory": self.from_memory,
            "from_ram": self.from_ram,
            "from_disk": self.from_disk,
            "computed_tokens": self.computed_tokens,
            "reason": self.reason,
            "why": self.why,
            "differs_at": self.differs_at,
            "prompt_text": self.prompt_text,
            "cached_text": self.cached_text,
            "evicted_tokens": self.evicted_tokens,
            "hint": self.hint,
        }

    def __str__(self) -> str:
        tiers = ", ".join(
            f"{count} from {name}"
            for count, name in ((self.from_memory, "memory"), (self.from_ram, "RAM"), (self.from_disk, "disk"))
            if count
        )
        lines = [f"{self.reused_tokens} of {self.prompt_tokens} prompt tokens reused{f' ({tiers})' if tiers else ''}"]
        if self.differs_at is None:
            return f"{lines[0]}: {self.why}"
        lines.append(f"from token {self.differs_at} on: {self.why}")
        if self.evicted_tokens:
            lines.append(f"  {self.evicted_tokens} tokens from there on were cached before")
        lines.append(f"  this prompt: {self.prompt_text!r}")
        if self.cached_window:
            lines.append(f"  cached text: {self.cached_text!r}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


def explain(
    trace: PrefixTrace,
    prompt: Seq[int],
    decode: Callable[[Seq[int]], str],
    *,
    reused: int | None = None,
    from_ram: int = 0,
    from_disk: int = 0,
) -> CacheExplanation:
    """Put a trace into words.

    Args:
        prompt: the tokens the trace is of.
        decode: text of token ids, special tokens included.
        reused: tokens that were taken in the end; fewer than the trace says if there was no room to copy rows. None is
            what the trace says.
        from_ram, from_disk: tokens brought back from there for this prompt, more than `reused` if it was preempted.
    """
    found = min(trace.n_reused, len(prompt))
    reused = found if reused is None else reused
    from_ram = min(from_ram, reused)
    from_disk = min(from_disk, reused - from_ram)
    reason: MissReason = "no room" if reused < found else trace.reason
    place = trace.differs_at
    if trace.reason == "last token":
        window: tuple[int, ...] = ()
        cached: tuple[int, ...] = ()
        before = 0
    else:
        before = min(place, TOKENS_BEFORE)
        window = tuple(prompt[place - before : place + SHOWN_TOKENS])
        cached = window[:before] + trace.nearest if trace.nearest else ()
    return CacheExplanation(
        prompt_tokens=len(prompt),
        from_memory=reused - from_ram - from_disk,
        from_ram=from_ram,
        from_disk=from_disk,
        reason=reason,
        differs_at=None if trace.reason == "last token" else place,
        prompt_window=window,
        cached_window=cached,
        n_before=before,
        evicted_tokens=trace.n_evicted,
        hint=_hint(trace, prompt, window, cached, before, decode) if cached and reason == "other text" else None,
        _decode=decode,
    )


def _hint(
    trace: PrefixTrace,
    prompt: Seq[int],
    window: tuple[int, ...],
    cached: tuple[int, ...],
    before: int,
    decode: Callable[[Seq[int]], str],
) -> str | None:
    """A usual cause of the difference, if it looks like one."""
    place, nearest = trace.differs_at, trace.nearest
    rest = list(prompt[place : place + SHOWN_TOKENS])
    if place and rest:
        doubled = prompt[place - 1]
        # The same text one token later, and that token is the one before it again: begin-of-sequence, usually.
        if rest[0] == doubled and _agree(rest[1:], nearest):
            return f"the prompt has {decode([doubled])!r} twice where the cached text has it once"
        if nearest[0] == doubled and _agree(rest, nearest[1:]):
            return f"the cached text has {decode([doubled])!r} twice where the prompt has it once"
    mine, its = decode(window[before:]), decode(cached[before:])
    if _same_but_for_whitespace(mine, its):
        return "the two texts differ in whitespace only"
    mine, its = decode(window), decode(cached)
    dates = _DATE.findall(mine), _DATE.findall(its)
    if dates[0] and dates[1] and dates[0] != dates[1] and _spans(window, cached, before, decode):
        return f"a date or time stands there: {dates[0][0]!r} now, {dates[1][0]!r} before; put such things last"
    found = _find(prompt, place + 1, nearest)
    if found is not None:
        return f"the cached text goes on with what this prompt has from token {found} on: same parts, other order"
    return None


def _agree(left: Seq[int], right: Seq[int]) -> bool:
    """Whether the two begin with the same tokens, at least a few."""
    shared = min(len(left), len(right), _MIN_SHARED_TOKENS)
    return shared > 0 and list(left[:shared]) == list(right[:shared])


def _same_but_for_whitespace(mine: str, its: str) -> bool:
    """Whether the texts agree for a while when all whitespace is taken out, and do not with it."""
    left, right = "".join(mine.split()), "".join(its.split())
    shared = min(len(left), len(right))
    if left[:shared] != right[:shared] or mine == its:
        return False
    return shared >= _MIN_SHARED_TOKENS or left == right


def _spans(window: Seq[int], cached: Seq[int], before: int, decode: Callable[[Seq[int]], str]) -> bool:
    """Whether the first date that differs lies at the difference, not somewhere behind it."""
    common = len(decode(window[:before]))
    for text in (decode(window), decode(cached)):
        if any(match.start() <= common <= match.end() for match in _DATE.finditer(text)):
            return True
    return False


def _find(prompt: Seq[int], start: int, wanted: Seq[int]) -> int | None:
    """Where a run of `wanted` stands in the prompt from `start` on. Its head may differ: texts merge at their seams."""
    for skipped in (0, 4, 8):
        run = list(wanted[skipped : skipped + 2 * _MIN_SHARED_TOKENS])
        if len(run) < _MIN_SHARED_TOKENS:
            return None
        for place in range(start, len(prompt) - len(run) + 1):
            if prompt[place] == run[0] and list(prompt[place : place + len(run)]) == run:
                return max(start, place - skipped)
    return None
