"""How an answer looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from exl2_rag.qa.answer import Answer, Citation


def render_answer(answer: Answer) -> RenderableType:
    """Text, then every quote with its place, then what it cost."""
    lines: list[RenderableType] = []
    if answer.answerable:
        for claim in answer.claims:
            if claim.text != claim.citation.quote:  # some models answer with their quotes
                lines.append(Text(claim.text, style="bold"))
            lines.append(Padding(Text(f"“{claim.citation.quote}”", style="italic"), (0, 0, 0, 2)))
            lines.append(Padding(Text(place(claim.citation), style="cyan"), (0, 0, 0, 2)))
    else:
        lines.append(Text("The documents do not answer this, as far as the model can tell.", style="bold yellow"))
    if answer.rejected:
        lines.append(Text(f"{len(answer.rejected)} claim(s) left out: their quotes are not in the documents", "yellow"))
    if answer.truncated:
        lines.append(Text("The reply was cut off; raise max_tokens in [answers]", "yellow"))
    if answer.dropped:
        lines.append(Text(f"{len(answer.dropped)} chunk(s) did not fit the context and were not shown", "yellow"))
    lines.append(Text(cost(answer), style="dim"))
    return Group(*lines)


def place(citation: Citation) -> str:
    """File, page and offsets of a quote in one line."""
    page = f", page {citation.page}" if citation.page is not None else ""
    heading = f" ({citation.heading})" if citation.heading else ""
    return f"{citation.source}{page}, characters {citation.start}–{citation.end}{heading}"


def cost(answer: Answer) -> str:
    """Tokens and times in one line."""
    usage, timings = answer.usage, answer.timings
    return (
        f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens from the cache · "
        f"{usage.completion_tokens} tokens written · found in {timings.retrieval_s * 1000:.0f} ms, "
        f"first token after {timings.first_token_s * 1000:.0f} ms, done in {timings.total_s * 1000:.0f} ms"
    )
