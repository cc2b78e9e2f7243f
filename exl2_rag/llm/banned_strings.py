"""Where in a text a banned string stands, or may be about to. Knows strings only.

Case does not count: characters are compared in lower case, one by one, so that places in the text stay the same
(those few whose lower case is more than one character, as "İ", are compared as they are).
"""

from __future__ import annotations

from collections.abc import Iterable


def fold(text: str) -> str:
    """The text in lower case, character for character: of the same length."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := one.lower()) == 1 else one for one in text)


def overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` with which `string` begins, `string` as a whole excepted."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0


class BannedStrings:
    """Strings that a text must not hold, in whatever case.

    Args:
        strings: none is empty.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._strings = tuple(dict.fromkeys(map(fold, strings)))

    def __bool__(self) -> bool:
        return bool(self._strings)

    def find(self, text: str) -> int | None:
        """Where the first banned string in `text` begins; None if there is none."""
        folded = fold(text)
        return min((place for one in self._strings if (place := folded.find(one)) >= 0), default=None)

    def begins_at(self, text: str) -> int:
        """The first place in `text` from which its rest could become a banned string; its length if there is none."""
        # No longer end than the longest string matters.
        longest = max((len(one) for one in self._strings), default=0)
        folded = fold(text[-longest:]) if longest else ""
        return len(text) - max((overlap(folded, one) for one in self._strings), default=0)
