"""`exl2-rag demo`: the whole path on the documents that come with it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from exl2_rag.cli.answer_view import cost, place, render_answer
from exl2_rag.cli.common import IndexOption, JsonOption, ModelOption, busy, command, open_llm, out, print_json
from exl2_rag.demo import documents_dir
from exl2_rag.errors import SettingsError
from exl2_rag.settings import load_settings

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.qa.answer import Answer
    from exl2_rag.retrieval import DocumentIndex

CHAIN_QUESTIONS = (
    "How many tokens does a page hold by default?",
    "What does the scheduler do when no page is left?",
    "Which files does the loader refuse?",
)
QUERY_ENGINE_QUESTION = "What happens when a stream is closed?"
DEFAULT_DEMO_INDEX = Path(".exl2-rag/demo")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quote:
    """A verified quote and its place in one line."""

    text: str
    quote: str
    place: str


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, asked twice: the second time its prompt is in the KV cache."""

    question: str
    framework: str
    answer: str
    quotes: tuple[Quote, ...]
    prompt_tokens: int
    cached_cold: int
    cached_warm: int
    cold_s: float
    warm_s: float


@command
def demo(
    model: ModelOption = None,
    index: IndexOption = DEFAULT_DEMO_INDEX,
    as_json: JsonOption = False,
) -> None:
    """Index the demo documents and ask them four questions, through LangChain and LlamaIndex."""
    _require_frameworks()
    from exl2_rag.cli.index import print_report, update_index
    from exl2_rag.retrieval import DocumentIndex

    started = time.perf_counter()
    with DocumentIndex.create_or_open(index) as opened:
        report = update_index(opened, documents_dir(), quiet=as_json)
        if not as_json:
            print_report(report)
        with open_llm(model, load_settings("default"), quiet=as_json) as llm:
            asked = [*_through_langchain(llm, opened, as_json), _through_llama_index(llm, opened, as_json)]
    total_s = round(time.perf_counter() - started, 2)
    if as_json:
        print_json({"index": report, "asked": asked, "total_s": total_s})
        return
    out.print(_summary(asked))
    out.print(f"Done in {total_s:.1f} s. Now yours: exl2-rag index DIR, then exl2-rag ask 'your question'", style="dim")


def _through_langchain(llm: ExL2LLM, index: DocumentIndex, quiet: bool) -> list[Asked]:
    from exl2_rag.adapters.langchain import citation_chain

    chain = citation_chain(llm, index)
    asked = []
    for question in CHAIN_QUESTIONS:
        cold, cold_s = _timed(lambda: chain.invoke(question), quiet)  # noqa: B023 - called before the next round
        warm, warm_s = _timed(lambda: chain.invoke(question), quiet)  # noqa: B023
        if not quiet:
            _title(question, "LangChain chain")
            out.print(Padding(render_answer(cold), (0, 0, 0, 2)))
            out.print(Padding(Text(f"again: {cost(warm)}", style="dim"), (0, 0, 0, 2)))
        asked.append(_asked(question, cold, warm, cold_s, warm_s))
    return asked


def _through_llama_index(llm: ExL2LLM, index: DocumentIndex, quiet: bool) -> Asked:
    from exl2_rag.adapters.llama_index import citation_engine

    engine = citation_engine(llm, index)
    cold, cold_s = _timed(lambda: engine.query(QUERY_ENGINE_QUESTION), quiet)
    warm, warm_s = _timed(lambda: engine.query(QUERY_ENGINE_QUESTION), quiet)
    cold_metadata, warm_metadata = cold.metadata or {}, warm.metadata or {}
    quotes = tuple(
        Quote(one["text"], one["quote"], f"{one['source']}, characters {one['start']}–{one['end']}")
        for one in cold_metadata["citations"]
    )
    usage, warm_usage = cold_metadata["usage"], warm_metadata["usage"]
    asked = Asked(
        question=QUERY_ENGINE_QUESTION,
        framework="LlamaIndex",
        answer=str(cold),
        quotes=quotes,
        prompt_tokens=usage["prompt_tokens"],
        cached_cold=usage["prompt_tokens_details"]["cached_tokens"],
        cached_warm=warm_usage["prompt_tokens_details"]["cached_tokens"],
        cold_s=cold_s,
        warm_s=warm_s,
    )
    if not quiet:
        _title(QUERY_ENGINE_QUESTION, "LlamaIndex query engine")
        if asked.answer not in {quote.quote for quote in quotes}:
            out.print(Text(f"  {asked.answer}", style="bold"))
        for quote in quotes:
            out.print(Text(f"    “{quote.quote}”", style="italic"))
            out.print(Text(f"    {quote.place}", style="cyan"))
    return asked


def _timed(call: Callable[[], T], quiet: bool) -> tuple[T, float]:
    started = time.perf_counter()
    with busy("Reading", quiet=quiet):
        result = call()
    return result, time.perf_counter() - started


def _asked(question: str, cold: Answer, warm: Answer, cold_s: float, warm_s: float) -> Asked:
    return Asked(
        question=question,
        framework="LangChain",
        answer=cold.text,
        quotes=tuple(Quote(claim.text, claim.citation.quote, place(claim.citation)) for claim in cold.claims),
        prompt_tokens=cold.usage.prompt_tokens,
        cached_cold=cold.usage.cached_tokens,
        cached_warm=warm.usage.cached_tokens,
        cold_s=cold_s,
        warm_s=warm_s,
    )


def _title(question: str, framework: str) -> None:
    out.print()
    out.print(Text.assemble((question, "bold green"), (f"  ({framework})", "dim")))


def _summary(asked: list[Asked]) -> Table:
    table = Table(title="Cold against warm", title_justify="left", title_style="bold")
    table.add_column("question", overflow="fold")
    for column in ("prompt tokens", "cached, cold", "cached, warm", "cold s", "warm s"):
        table.add_column(column, justify="right")
    for one in asked:
        numbers = (one.prompt_tokens, one.cached_cold, one.cached_warm)
        table.add_row(one.question, *map(str, numbers), f"{one.cold_s:.2f}", f"{one.warm_s:.2f}")
    return table


def _require_frameworks() -> None:
    missing = [name for name in ("langchain_core", "llama_index") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"the demo needs both frameworks, {' and '.join(missing)} missing; install them with "
            'pip install "exl2-rag[demo]"'
        )
