"""Where the grammar engine takes a keyword in a looser sense than JSON Schema does: the strict form, as a pattern.

Days that a month does not have, seconds that no clock shows and host names in encodings nobody checked are ruled out
rather than let through: what is decoded must pass any validator.
"""

from __future__ import annotations

import re
from typing import Any

_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    # 29 February: in years divisible by 4, but of the full centuries only in those divisible by 400
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# 1 to 63 letters, digits and inner hyphens, of which the third and fourth are not both hyphens ("xn--…")
_LABEL = (
    "[a-zA-Z0-9](?:[a-zA-Z0-9]|[a-zA-Z0-9-][a-zA-Z0-9]|[a-zA-Z0-9-][a-zA-Z0-9][a-zA-Z0-9-]{0,59}[a-zA-Z0-9]"
    "|[a-zA-Z0-9]-[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?)?"
)
_HOST_NAME_LENGTH = 253

_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL})*$",
}


def tighten(part: dict[str, Any]) -> None:
    """Replace, in one schema object, what would be enforced too loosely."""
    pattern = part.get("pattern")
    if isinstance(pattern, str):
        part["pattern"] = _ecma_whitespace(pattern)
    strict = _PATTERNS.get(part["format"]) if isinstance(part.get("format"), str) else None
    if strict is None:
        return
    if part["format"] == "hostname":
        longest = part.get("maxLength", _HOST_NAME_LENGTH)
        part["maxLength"] = min(longest, _HOST_NAME_LENGTH) if isinstance(longest, int) else longest
    del part["format"]
    if "pattern" in part:
        part["allOf"] = [*part.get("allOf", []), {"pattern": strict}]
    else:
        part["pattern"] = strict


def _ecma_whitespace(pattern: str) -> str:
    r"""In JSON Schema's dialect, ECMAScript's, the byte order mark is whitespace; to the grammar engine it is not."""
    classes = {r"\s": r"[\s\x{FEFF}]", r"\S": r"[^\s\x{FEFF}]"}
    return re.sub(r"\\.", lambda found: classes.get(found[0], found[0]), pattern, flags=re.DOTALL)
