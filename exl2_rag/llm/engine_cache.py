"""What an engine can say about its cache, and do with it, between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

from exl2_rag.errors import RequestError
from exl2_rag.llm.cache_explanation import CacheExplanation, explain
from exl2_rag.llm.cache_report import CacheReport
from exl2_rag.llm.cached_order import cached_order
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.lora.choice import Lora, LoraChoices, lora_choices, lora_identity
from exl2_rag.llm.page_table_check import check_integrity
from exl2_rag.llm.prefill_rate import PrefillRate
from exl2_rag.llm.prefix_trace import trace_prefix
from exl2_rag.llm.prompt_report import check_prompt
from exl2_rag.llm.scheduler import Scheduler
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.tenants import Tenants
from exl2_rag.llm.tier_trace import trace_tiers

if TYPE_CHECKING:
    from exl2_rag.llm.kv_store.tiers import CacheTiers
    from exl2_rag.llm.lora.shelf import LoraSet
    from exl2_rag.llm.model_runner import ModelRunner
    from exl2_rag.llm.speculation.speculator import Speculator


class Loras(Protocol):
    """Where a request's LoRA adapters are found."""

    def resolve(self, choices: LoraChoices) -> LoraSet:
        """The adapters of these names. Raises RequestError if there is none of a name."""
        ...


class ShownText(Protocol):
    """What explanations need to be read by people."""

    def shown_text(self, token_ids: Seq[int]) -> str:
        """The text of any token ids, special tokens included."""
        ...


class EngineCache:
    """The part of `Engine` that is about its cache; for the engine's thread, but for what says otherwise."""

    config: EngineConfig
    tiers: CacheTiers | None
    _scheduler: Scheduler
    _runner: ModelRunner
    _text: ShownText
    _tenants: Tenants
    _loras: Loras | None
    _prefill_rate: PrefillRate
    _speculator: Speculator | None
    _vocab_size: int
    _n_prompt_tokens: int
    _n_cached_tokens: int

    def cache_root(self, salt: str | None = None, lora: Iterable[tuple[str, float]] = ()) -> bytes:
        """The root of the pages of a request. Arguments and errors as for `fingerprint.root_key`."""
        return self._tenants.root(salt, lora)

    def unpin(self, sequence: Sequence) -> None:
        """Let go of the pages that a sequence with `keep_pages` kept. Harmless when that has happened already."""
        self._scheduler.unpin(sequence)

    def renew_pin(self, sequence: Sequence, ttl_s: float | None) -> bool:
        """Begin another time to live of a pin; False if it is over."""
        return self._scheduler.pins.renew(sequence, ttl_s)

    def is_pinned(self, sequence: Sequence) -> bool:
        """Whether a sequence's pages are kept at this moment. Safe from any thread."""
        return self._scheduler.pins.is_active(sequence)

    def purge_memory(self, source: str) -> int:
        """Forget what the cache and host memory hold of a source; see `CacheTiers.purge_memory`."""
        return 0 if self.tiers is None else self.tiers.purge_memory(source)

    def on_room(self, action: Callable[[], None]) -> None:
        """Have `action` called, by another thread, when the store can take pages again for which it had no room."""
        if self.tiers is not None and self.tiers.store is not None:
            self.tiers.store.on_room(action)

    def evict(
        self, token_ids: tuple[int, ...] | None, *, cache_salt: str | None = None, all_salts: bool = False
    ) -> int:
        """Forget cached pages that nobody holds; return how many.

        Args:
            token_ids: the text to forget, with all that goes on from it; None: every text.
            cache_salt: whose; all adapter sets count.
            all_salts: everybody's.
        """
        table = self._scheduler.table
        self._scheduler.pins.expire()
        roots = list(table.roots) if all_salts else self._tenants.roots(cache_salt)
        return sum(table.drop(token_ids, root) for root in roots)

    def explain(
        self, token_ids: tuple[int, ...], *, cache_salt: str | None = None, lora: Lora | None = None
    ) -> CacheExplanation:
        """What a prompt would find in the pages and the tiers below them now. Changes nothing.

        Raises:
            RequestError, ContextOverflowError: as for `prepare`.
        """
        check_prompt(token_ids, self.config, self._vocab_size, n_new=0)
        table = self._scheduler.table
        limit = len(token_ids) - 1
        root = self.cache_root(cache_salt, lora_identity(self._lora_set(lora)))
        trace = trace_prefix(table, token_ids, limit, root=root, other_roots=reversed(table.roots))
        if self.tiers is None:
            return explain(trace, token_ids, self._text.shown_text)
        trace, peek = trace_tiers(trace, self.tiers, token_ids, limit, root)
        shown = self._text.shown_text
        return explain(trace, token_ids, shown, from_ram=peek.ram_tokens, from_disk=peek.disk_tokens)

    def cached_order(
        self,
        prefix: Seq[int],
        blocks: Seq[Seq[int]],
        *,
        first: Seq[Seq[int]] | None = None,
        cache_salt: str | None = None,
        lora: Lora | None = None,
    ) -> list[int]:
        """See `cached_order.cached_order`."""
        root = self.cache_root(cache_salt, lora_identity(self._lora_set(lora)))
        return cached_order(self._scheduler.table, prefix, blocks, first=first, root=root)

    def report(self, *, per_salt: bool = False) -> CacheReport:
        """The state of the cache."""
        table = self._scheduler.table
        pins = self._scheduler.pins.reports()
        counts = table.counts()
        return CacheReport(
            page_size=table.page_size,
            pages=table.n_pages,
            free_pages=counts.free,
            cached_pages=counts.cached,
            running_pages=counts.running,
            pinned_pages=counts.pinned,
            size_bytes=self._runner.cache.size_bytes,
            prompt_tokens=self._n_prompt_tokens,
            cached_tokens=self._n_cached_tokens,
            evicted_pages=table.n_evicted,
            preemptions=self._scheduler.n_preemptions,
            running_requests=len(self._scheduler.running),
            waiting_requests=len(self._scheduler.waiting),
            tiers=None if self.tiers is None else self.tiers.report(),
            prefill_tokens_per_s=self._prefill_rate.tokens_per_s,
            pins=pins,
            salts=self._tenants.reports(table.roots) if per_salt else (),
            draft_tokens=0 if self._speculator is None else self._speculator.n_proposed,
            accepted_draft_tokens=0 if self._speculator is None else self._speculator.n_accepted,
        )

    def check_integrity(self) -> None:
        """Recompute the books of the cache from scratch and compare.

        Raises:
            CacheIntegrityError: they contradict each other.
        """
        check_integrity(self._scheduler.table)

    def _explanation(self, sequence: Sequence) -> CacheExplanation | None:
        if sequence.prefix_trace is None:
            return None
        prompt = sequence.token_ids[: sequence.n_prompt]
        return explain(
            sequence.prefix_trace,
            prompt,
            self._text.shown_text,
            reused=sequence.n_cached_tokens,
            from_ram=sequence.n_ram_tokens,
            from_disk=sequence.n_disk_tokens,
        )

    def _lora_set(self, lora: Lora | None) -> LoraSet:
        choices = lora_choices(lora)
        if not choices:
            return ()
        if self._loras is None:
            raise RequestError("this engine has no LoRA adapters; leave lora out")
        return self._loras.resolve(choices)
