"""`exl2-rag bench engine`: what the engine promises, measured: reuse of prefixes, questions on one text, even gaps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from exl2_rag.cli.bench import DEFAULT_BPW, DEFAULT_SHAPE, default_cache_dir, synthetic_model
from exl2_rag.cli.common import JsonOption, busy, command, err, out, print_json
from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM


@command
def engine(
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help=f"A model directory. Default: {DEFAULT_SHAPE} with random weights."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this: prefix-reuse, shared-prefix or inter-token-gap; may be repeated."),
    ] = None,
    prefix: Annotated[int, typer.Option(help="Tokens of a shared prefix.", min=1)] = 4096,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt beside streams.", min=1)] = 8192,
    computed: Annotated[int, typer.Option(help="Tokens of it that are computed before the streams begin.", min=0)] = 0,
    streams: Annotated[int, typer.Option(help="Texts written meanwhile.", min=1)] = 4,
    questions: Annotated[int, typer.Option(help="Questions on one text.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of prefix-reuse; their medians count.", min=1)] = 3,
    gap: Annotated[float, typer.Option(help="The promise: max_inter_token_gap of ExL2LLM.")] = 3.0,
    device: Annotated[str, typer.Option(help="As for ExL2LLM.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: the processors this process may use.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what the engine promises.

    prefix-reuse: the time to the first token, cold and with a cached prefix. shared-prefix: many questions on one text.
    inter-token-gap: the gaps between tokens of streams, alone and beside a long prompt.
    """
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.llm.benchmark_engine import MEASUREMENTS, EngineMeasure

    names = only if only else list(MEASUREMENTS)
    unknown = sorted(set(names) - set(MEASUREMENTS))
    if unknown:
        raise SettingsError(f"--only takes {', '.join(MEASUREMENTS)}; got {', '.join(unknown)}")
    sizes = EngineMeasure(
        prefix_tokens=prefix,
        prompt_tokens=prompt,
        computed_tokens=computed,
        streams=streams,
        questions=questions,
        runs=repeats,
    )
    model_dir = model or synthetic_model(default_cache_dir(), DEFAULT_SHAPE, DEFAULT_BPW)

    def open_llm(**options: Any) -> ExL2LLM:
        return ExL2LLM(model_dir, device=device, num_threads=threads, max_inter_token_gap=gap, **options)

    result: dict[str, Any] = {"model": model_dir.resolve().name, "device": device}
    for name in names:
        with busy(f"Measuring {name}", quiet=as_json):
            result[name] = MEASUREMENTS[name](open_llm, sizes)
    (err if as_json else out).print(_table(result, names))
    if as_json:
        print_json(result)


def _table(result: Mapping[str, Any], names: list[str]) -> Table:
    table = Table(title=result["model"], title_justify="left")
    for column in ("", "figure", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name in names:
        figures = list(result[name].items())
        for place, (figure, value) in enumerate(figures):
            table.add_row(
                name if place == 0 else "", figure.replace("_", " "), str(value), end_section=place == len(figures) - 1
            )
    return table
