"""The keywords that every way of asking takes beside the prompt and its `SamplingParams`.

`ExL2LLM.generate`, `stream`, `chat` and their async twins take the same ones, so they are named once, here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import Constraint
    from exl2_rag.llm.lora.choice import Lora
    from exl2_rag.llm.overflow import Overflow
    from exl2_rag.llm.sources import Sources


class RequestFields(TypedDict, total=False):
    """Those that become fields of a `GenerationRequest`; each may be left out.

    Attributes:
        constraint: what the continuation must obey.
        cache_salt: the tenant, see `GenerationRequest`.
        lora: LoRA adapters at work: a name, (name, scale), or a list of such; see `ExL2LLM.load_lora`.
        priority: requests of a higher one are served first, and take the place of those of a lower one; 0 by default.
        timeout_s: seconds the request may take, waiting included; then it fails with RequestTimeoutError.
        sources: ids of the documents in the prompt, or a mapping from each to the position of its first token; see
            `ExL2LLM.purge`. Without a position a document counts as standing at the very beginning.
        prompt_logprobs: also give log-probabilities of the prompt's tokens, with the so many most likely beside each.
        dropped_messages: places of messages that the caller has left out; comes back with the result.
    """

    constraint: Constraint | None
    cache_salt: str | None
    lora: Lora | None
    priority: int
    timeout_s: float | None
    sources: Sources
    prompt_logprobs: int | None
    dropped_messages: tuple[int, ...]


class RequestOptions(RequestFields, total=False):
    """Keywords of one request; each may be left out.

    Attributes:
        overflow: what to do with a prompt that leaves no room for `max_tokens`. "error", the default, refuses it if not
            one token fits, and else ends the text where the context ends (`result.prompt.context_full` says so).
            "truncate-oldest-turns" leaves whole turns out of a chat, "truncate-left" the beginning of a plain prompt;
            see `exl2_rag.llm.overflow`.
    """

    overflow: Overflow
