"""What to do with a prompt that is too long: refuse it, or leave out what the caller agreed to. No torch.

Nothing is left out unless the caller asked for it, and what was left out comes back with the result. A chat loses whole
turns, oldest first: a turn is a user's message and all that follows up to the next one, so a tool's result never stands
without its call. System messages and the last turn always stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

from exl2_rag.errors import ContextOverflowError, RequestError

Overflow = Literal["error", "truncate-oldest-turns", "truncate-left"]

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class FittedChat:
    """A chat that fits.

    Attributes:
        token_ids: the prompt.
        dropped: places of the messages that were left out, in ascending order.
    """

    token_ids: tuple[int, ...]
    dropped: tuple[int, ...]


def reserved_tokens(max_tokens: int | None, limit: int) -> int:
    """Tokens that a shortened prompt leaves for its continuation: `max_tokens`, or without one a quarter of all."""
    return min(max(1, limit // 4) if max_tokens is None else max_tokens, limit - 1)


def droppable_turns(messages: Seq[Mapping[str, Any]]) -> list[list[int]]:
    """The turns that may be left out, oldest first, each as the places of its messages; the last turn is not there.

    What stands before the first user's message is a turn, too.
    """
    turns: list[list[int]] = [[]]
    for place, message in enumerate(messages):
        if message.get("role") == "user":
            turns.append([])
        if message.get("role") not in _SYSTEM_ROLES:
            turns[-1].append(place)
    return [turn for turn in turns[:-1] if turn]


def fit_chat(
    messages: Seq[Mapping[str, Any]],
    encode: Callable[[list[Mapping[str, Any]]], Seq[int]],
    *,
    policy: str,
    limit: int,
    reserve: int,
) -> FittedChat:
    """Leave out as few of the oldest turns as it takes for `reserve` tokens to fit behind the chat.

    Where leaving out all of them still leaves less room than that, but some, the chat is as short as it can be.

    Args:
        encode: the prompt of some of the messages.
        policy: "error" leaves nothing out, nor does it check.
        limit: tokens of prompt and continuation together.

    Raises:
        RequestError: a policy that is none for chats.
        ContextOverflowError: system messages and last turn alone are too long.
    """
    check_policy(policy, ("error", "truncate-oldest-turns"), "a chat")
    whole = tuple(encode(list(messages)))
    if policy == "error" or len(whole) + reserve <= limit:
        return FittedChat(whole, ())
    turns = droppable_turns(messages)
    tried: dict[int, tuple[int, ...]] = {0: whole}

    def without(n_turns: int) -> tuple[int, ...]:
        if n_turns not in tried:
            left_out = {place for turn in turns[:n_turns] for place in turn}
            tried[n_turns] = tuple(encode([one for place, one in enumerate(messages) if place not in left_out]))
        return tried[n_turns]

    n_turns = bisect_left(range(len(turns)), True, key=lambda n: len(without(n)) + reserve <= limit)
    token_ids = without(n_turns)
    if len(token_ids) + 1 > limit:
        raise ContextOverflowError(
            f"the system messages and the last turn of the chat have {len(token_ids)} tokens, the limit is {limit}, a "
            "new token included; shorten them, nothing more can be left out",
            prompt_tokens=len(token_ids),
            limit_tokens=limit,
        )
    return FittedChat(token_ids, tuple(sorted(place for turn in turns[:n_turns] for place in turn)))


def fit_prompt(
    token_ids: tuple[int, ...], *, policy: str, limit: int, reserve: int, bos: int | None
) -> tuple[tuple[int, ...], int]:
    """Leave out the beginning of a prompt, up to where `reserve` tokens fit behind it; a BOS token stays at its head.

    Args:
        policy: "error" leaves nothing out, nor does it check.

    Returns:
        The prompt, and how many tokens were left out.

    Raises:
        RequestError: a policy that is none for plain prompts.
    """
    check_policy(policy, ("error", "truncate-left"), "a plain prompt")
    n_dropped = len(token_ids) + reserve - limit
    if policy == "error" or n_dropped <= 0:
        return token_ids, 0
    head = token_ids[:1] if bos is not None and token_ids[0] == bos and limit - reserve > 1 else ()
    return (*head, *token_ids[len(head) + n_dropped :]), n_dropped


def check_policy(policy: str, allowed: Seq[str], what: str) -> None:
    """Refuse a policy that does not go with the kind of prompt.

    Raises:
        RequestError: it is not among those allowed.
    """
    if policy not in allowed:
        raise RequestError(f"overflow of {what} must be one of {', '.join(map(repr, allowed))}, got {policy!r}")
