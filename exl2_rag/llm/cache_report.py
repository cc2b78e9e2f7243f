"""The state of the KV cache, in numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exl2_rag.llm.pin_book import PinReport

if TYPE_CHECKING:
    from exl2_rag.llm.kv_store.tier_report import TierReport


@dataclass(frozen=True, slots=True)
class SaltReport:
    """What one tenant has in the cache and took from it; `cache_salt` None is all requests without a salt."""

    cache_salt: str | None
    pages: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The state of the KV cache. Each page is free, cached (kept, but held by nobody), running or pinned.

    Attributes:
        page_size: tokens on a page.
        size_bytes: memory of the whole cache.
        prompt_tokens, cached_tokens: of all requests so far; cached ones were not computed again.
        evicted_pages: cached pages whose place was needed.
        preemptions: how often a running request had to give up its pages and wait.
        running_requests, waiting_requests: at present.
        prefill_tokens_per_s: how fast this engine has computed prompts; None before it has computed a long one.
        pins: each of them, the oldest first.
        salts: per tenant, where it was asked for; those whose requests came last.
        tiers: what host memory and disk hold and gave; None without them.
        draft_tokens, accepted_draft_tokens: tokens that were guessed, and those that were right, of all requests.
    """

    page_size: int
    pages: int
    free_pages: int
    cached_pages: int
    running_pages: int
    pinned_pages: int
    size_bytes: int
    prompt_tokens: int
    cached_tokens: int
    evicted_pages: int
    preemptions: int
    running_requests: int
    waiting_requests: int
    prefill_tokens_per_s: float | None = None
    pins: tuple[PinReport, ...] = ()
    salts: tuple[SaltReport, ...] = ()
    tiers: TierReport | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def prefill_saved_s(self) -> float | None:
        """Seconds the cached tokens would have taken at `prefill_tokens_per_s`; None where that is not known."""
        return self.cached_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else None
