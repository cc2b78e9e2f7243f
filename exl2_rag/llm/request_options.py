"""The keywords that every way of asking takes beside the prompt and its `SamplingParams`.

`ExL2LLM.generate`, `stream`, `chat` and their async twins take the same ones, so they are named once, here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import Constraint
    from exl2_rag.llm.lora.choice import Lora
    from exl2_rag.llm.sources import Sources


class RequestOptions(TypedDict, total=False):
    """Keywords of one request; each may be left out.

    Attributes:
        constraint: what the continuation must obey.
        cache_salt: the tenant, see `GenerationRequest`.
        lora: LoRA adapters at work: a name, (name, scale), or a list of such; see `ExL2LLM.load_lora`.
        priority: requests of a higher one are served first, and take the place of those of a lower one; 0 by default.
        timeout_s: seconds the request may take, waiting included; then it fails with RequestTimeoutError.
        sources: ids of the documents in the prompt, or a mapping from each to the position of its first token; see
            `ExL2LLM.purge`. Without a position a document counts as standing at the very beginning.
    """

    constraint: Constraint | None
    cache_salt: str | None
    lora: Lora | None
    priority: int
    timeout_s: float | None
    sources: Sources
