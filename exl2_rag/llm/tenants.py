"""Which salts and adapter sets have been used lately, and what their requests took from the cache. No torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from exl2_rag.llm.cache_report import SaltReport

MAX_ROOTS = 4096
"""Roots that are remembered. One that has not been used for long is forgotten; its pages are evicted like any."""

Lora = tuple[tuple[str, float], ...]


@dataclass(slots=True)
class _Tenant:
    salt: str | None
    lora: Lora
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Tenants:
    """The roots of an engine's requests. Safe from any thread.

    Args:
        root_of: the root of a salt and an adapter set, see `fingerprint.root_key`.
    """

    def __init__(self, root_of: Callable[[str | None, Lora], bytes]) -> None:
        self._root_of = root_of
        self._lock = threading.Lock()
        self._roots: dict[tuple[str | None, Lora], bytes] = {}
        self._tenants: OrderedDict[bytes, _Tenant] = OrderedDict()  # the last used at the end

    def root(self, salt: str | None, lora: Iterable[tuple[str, float]] = ()) -> bytes:
        """The root of a request's pages.

        Raises:
            RequestError: the salt is not a non-empty text.
        """
        adapters = tuple(sorted((name, float(scale)) for name, scale in lora))
        with self._lock:
            found = self._roots.get((salt, adapters))
            if found is None:
                found = self._root_of(salt, adapters)
                self._roots[salt, adapters] = found
                self._tenants[found] = _Tenant(salt, adapters)
                if len(self._tenants) > MAX_ROOTS:
                    _, oldest = self._tenants.popitem(last=False)
                    del self._roots[oldest.salt, oldest.lora]
            else:
                self._tenants.move_to_end(found)
            return found

    def roots(self, salt: str | None) -> list[bytes]:
        """The roots of a salt, one for each adapter set that any request has used lately."""
        with self._lock:
            adapters = {one.lora for one in self._tenants.values()}
        return [self._root_of(salt, lora) for lora in {(), *adapters}]

    def note(self, root: bytes | None, prompt_tokens: int, cached_tokens: int) -> None:
        """Count a finished request."""
        with self._lock:
            tenant = self._tenants.get(root) if root is not None else None
            if tenant is not None:
                tenant.prompt_tokens += prompt_tokens
                tenant.cached_tokens += cached_tokens

    def reports(self, pages_of: Mapping[bytes, int]) -> tuple[SaltReport, ...]:
        """What each salt has and took, the last used first. `pages_of` counts the pages below each root."""
        with self._lock:
            by_salt: dict[str | None, list[int]] = {}
            for root, tenant in reversed(self._tenants.items()):
                sums = by_salt.setdefault(tenant.salt, [0, 0, 0])
                sums[0] += pages_of.get(root, 0)
                sums[1] += tenant.prompt_tokens
                sums[2] += tenant.cached_tokens
        return tuple(SaltReport(salt, *sums) for salt, sums in by_salt.items())
