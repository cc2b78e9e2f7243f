"""What callers can do with the cache of an engine: fill it, keep parts of it, empty it, and ask it why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq

from exl2_rag.errors import RequestError
from exl2_rag.llm.cache_explanation import CacheExplanation
from exl2_rag.llm.cache_report import CacheReport
from exl2_rag.llm.chat_template import Message
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.lora.choice import Lora
from exl2_rag.llm.pin import Pin, check_ttl
from exl2_rag.llm.prompts import Prompt
from exl2_rag.llm.request import Usage
from exl2_rag.llm.sequence import Sequence


class CacheControl(ABC):
    """The part of `ExL2LLM` that is about its cache. A prompt is a text, token ids, or the beginning of a chat."""

    _engine: Engine
    _thread: EngineThread

    @abstractmethod
    def _encode_prefix(self, prompt: Prompt | Seq[Message]) -> tuple[int, ...]:
        """Token ids of a prompt, or of the beginning of a chat, without the head of the assistant's turn."""

    @abstractmethod
    def _compute(self, sequence: Sequence) -> Usage:
        """Run a prepared sequence to its end."""

    @property
    def keeps_pages(self) -> bool:
        """Whether pages have a place beyond the KV cache: host memory, or a store on disk."""
        return self._engine.tiers is not None

    def warm(self, prompt: Prompt | Seq[Message], *, cache_salt: str | None = None, lora: Lora | None = None) -> Usage:
        """Compute a prompt, or the beginning of a chat, so that later requests of this salt and these
        adapters find it in the cache.

        Returns:
            Its token count, and how many of them were there already.
        """
        return self._compute(self._engine.prepare_prompt(self._encode_prefix(prompt), cache_salt=cache_salt, lora=lora))

    def pin(
        self,
        prompt: Prompt | Seq[Message],
        *,
        cache_salt: str | None = None,
        lora: Lora | None = None,
        ttl_s: float | None = None,
    ) -> Pin:
        """`warm`, and keep the pages until the returned pin is released, its time is over, or the engine is closed.

        Args:
            ttl_s: seconds from the moment the prompt is computed; None: until it is released.

        Raises:
            PinLimitError: all pins together would leave too little of the cache for requests.
            RequestError, EngineError: as for `generate`. A pin that failed or was cancelled keeps nothing.
        """
        check_ttl(ttl_s)
        sequence = self._engine.prepare_prompt(
            self._encode_prefix(prompt), keep_pages=True, cache_salt=cache_salt, lora=lora, pin_ttl_s=ttl_s
        )
        pin = Pin(self._thread, self._engine, sequence)
        try:
            self._compute(sequence)
        except BaseException:  # an interrupt may come when the pages are kept already and nobody knows yet
            pin.release()
            raise
        return pin

    def purge(self, source: str) -> int:
        """Erase what the cache's tiers hold of a document: pages of requests that named it in `sources`, and all after.

        Nothing of them is left on the disk when this returns. Pages that running requests use stay in the cache until
        those end.

        Returns:
            How many page images are gone.

        Raises:
            KVStoreError: another process writes to the store, or the disk fails.
        """
        n_pages = self._thread.call(lambda: self._engine.purge_memory(source))
        store = None if self._engine.tiers is None else self._engine.tiers.store
        return (
            n_pages if store is None else n_pages + store.purge(source)
        )  # here, so that no request waits for the disk

    def evict(
        self,
        prompt: Prompt | Seq[Message] | None = None,
        *,
        cache_salt: str | None = None,
        everything: bool = False,
    ) -> int:
        """Forget cached pages of one salt: those of a prompt and of all that goes on from it, or all.

        Pages that a running request or a pin holds stay, and so do the leading pages of the prompt that other texts go
        on from. Images of pages in host memory or on disk stay as well; `purge` erases those of a document.

        Args:
            prompt: a text, token ids, or the beginning of a chat; None: everything of the salt.
            everything: of all salts. Then there is no prompt and no salt.

        Returns:
            How many pages were forgotten.
        """
        if everything and (prompt is not None or cache_salt is not None):
            raise RequestError("evict takes either a prompt or a cache_salt, or everything=True for all of them")
        token_ids = None if prompt is None else self._encode_prefix(prompt)
        if token_ids is not None and not token_ids:
            raise RequestError("expected a prompt of at least one token to evict, got none; None evicts all")
        return self._thread.call(lambda: self._engine.evict(token_ids, cache_salt=cache_salt, all_salts=everything))

    def explain_cache(
        self, prompt: Prompt | Seq[Message], *, cache_salt: str | None = None, lora: Lora | None = None
    ) -> CacheExplanation:
        """What a prompt, or the beginning of a chat, would find in the cache now. Computes and changes nothing."""
        token_ids = self._encode_prefix(prompt)
        return self._thread.call(lambda: self._engine.explain(token_ids, cache_salt=cache_salt, lora=lora))

    def cached_order(
        self,
        prefix: Seq[int],
        blocks: Seq[Seq[int]],
        *,
        first: Seq[Seq[int]] | None = None,
        cache_salt: str | None = None,
        lora: Lora | None = None,
    ) -> list[int]:
        """In which order blocks of tokens, such as passages, go on from a prefix on the deepest cached path.

        Args:
            prefix: the tokens before them.
            blocks: tokens of each, in the order that is preferred where the cache does not care.
            first: tokens of each where it stands right after the prefix, if they differ there.

        Returns:
            Indices of all blocks. The order is part of a prompt, so an answer may depend on it; it follows from what is
            cached at this moment, and is not the same tomorrow.
        """
        return self._thread.call(
            lambda: self._engine.cached_order(prefix, blocks, first=first, cache_salt=cache_salt, lora=lora)
        )

    def cache_report(self, *, per_salt: bool = False) -> CacheReport:
        """The state of the KV cache between two steps. `per_salt` adds what each tenant has and took."""
        return self._thread.call(lambda: self._engine.report(per_salt=per_salt))
