"""`exl2-rag eval`: perplexity of a model, and how far two models are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from exl2_rag.cli.common import JsonOption, busy, command, err, out, print_json
from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag import ExL2LLM

app = typer.Typer(help="Measure the quality of models on a text.", no_args_is_help=True)

TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", "-t", help="A text, a .jsonl file with a “text” a line, or a folder of such; may be repeated."
    ),
]
LengthOption = Annotated[int | None, typer.Option(help="Tokens of a window. Default: 2048, or what the model takes.")]
StrideOption = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next. Default: the length; less gives more context.")
]
LimitOption = Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens scored at most. Default: all.")]
DeviceOption = Annotated[str, typer.Option(help="As for ExL2LLM.")]
PrecisionOption = Annotated[str, typer.Option(help="As for ExL2LLM.")]
CacheOption = Annotated[str, typer.Option("--cache-dtype", help="As for ExL2LLM.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Default: the processors this process may use.")]


@app.command("ppl")
@command
def ppl(
    model: Annotated[Path, typer.Argument(help="Model directory.", metavar="MODEL")],
    text: TextOption = None,
    length: LengthOption = None,
    stride: StrideOption = None,
    limit: LimitOption = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA adapter (PEFT folder) to measure with.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache_dtype: CacheOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity: how well a model predicts a text. Less is better; only models of one tokenizer compare.

    The text is cut into windows of --length tokens, each token is scored once. Where the model's tokenizer adds BOS,
    every window begins with one.
    """
    from exl2_rag.llm.evaluation.corpus import read_texts
    from exl2_rag.llm.evaluation.perplexity import measure_perplexity

    texts = read_texts(_given(text))
    with _open(model, device, precision, cache_dtype, threads, length) as llm:
        name = None if lora is None else llm.load_lora(lora).name
        with _progress("Scoring", quiet=as_json) as tell:
            result = measure_perplexity(llm, texts, length=length, stride=stride, limit=limit, lora=name, progress=tell)
        settings = _settings(llm)
    if as_json:
        values = dataclasses.asdict(result) | {"tokens_per_s": result.tokens_per_s}
        print_json(
            {"model": model.resolve().name, "lora": name, "texts": [one.name for one in texts], **settings, **values}
        )
        return
    table = Table(
        title=f"{model.resolve().name}, {result.n_windows} windows of {result.length}, stride {result.stride}"
    )
    for column in ("tokens", "perplexity", "standard error", "tokens/s"):
        table.add_column(column, justify="right")
    figures = (f"{result.perplexity:.4f}", _shown(result.standard_error, 4), f"{result.tokens_per_s:,.1f}")
    table.add_row(f"{result.n_tokens:,}", *figures)
    out.print(table)


@app.command("kl")
@command
def kl(
    reference: Annotated[
        Path, typer.Argument(help="The model to compare with, such as the unquantised one.", metavar="A")
    ],
    other: Annotated[Path, typer.Argument(help="The model that is measured.", metavar="B")],
    text: TextOption = None,
    length: LengthOption = None,
    stride: StrideOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache_dtype: CacheOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """How far model B is from model A on a text: divergence of their predictions, and how often they agree.

    KL is that of B's predictions from A's, in nats a token; 0 is the same model. Both must have one tokenizer.
    """
    from exl2_rag.llm.evaluation.corpus import read_texts
    from exl2_rag.llm.evaluation.divergence import measure_divergence

    texts = read_texts(_given(text))
    options = (device, precision, cache_dtype, threads, length)
    with _open(reference, *options) as first, _open(other, *options) as second:
        with _progress("Comparing", quiet=as_json) as tell:
            result = measure_divergence(first, second, texts, length=length, stride=stride, limit=limit, progress=tell)
        settings = _settings(first)
    names = {"reference": reference.resolve().name, "other": other.resolve().name}
    if as_json:
        values = dataclasses.asdict(result) | {"tokens_per_s": result.tokens_per_s}
        print_json({**names, "texts": [one.name for one in texts], **settings, **values})
        return
    table = Table(
        title=f"{names['other']} against {names['reference']}: {result.n_tokens:,} tokens", title_justify="left"
    )
    table.add_column("")
    table.add_column("", justify="right")
    rows = {
        "mean KL": f"{result.mean_kl:.6f} ± {_shown(result.kl_standard_error, 6)}",
        "KL, half of the tokens below": f"{result.kl_p50:.6f}",
        "KL, 95 % below": f"{result.kl_p95:.6f}",
        "KL, 99 % below": f"{result.kl_p99:.6f}",
        "KL, greatest": f"{result.kl_max:.6f}",
        "same most likely token": f"{result.top1_agreement:.3%}",
        "five most likely shared": f"{result.top5_agreement:.3%}",
        f"perplexity of {names['reference']}": f"{result.perplexity:.4f}",
        f"perplexity of {names['other']}": f"{result.other_perplexity:.4f}",
        "tokens/s": f"{result.tokens_per_s:,.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)


def _shown(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _given(text: list[Path] | None) -> list[Path]:
    if not text:
        raise SettingsError("expected a text to evaluate on; give --text FILE, such as WikiText-2's validation file")
    return text


def _open(
    model: Path, device: str, precision: str, cache_dtype: str, threads: int | None, length: int | None
) -> ExL2LLM:
    """An engine for one long sequence at a time."""
    from exl2_rag import ExL2LLM
    from exl2_rag.llm.engine_config import DEFAULT_PAGE_SIZE
    from exl2_rag.llm.evaluation.perplexity import DEFAULT_LENGTH

    with busy(f"Loading {model.name}"):
        return ExL2LLM(
            model,
            device=device,
            precision=precision,
            cache_dtype=cache_dtype,
            num_threads=threads,
            # A window more than the one at work, so that no slice of it is pushed out.
            cache_tokens=2 * max(length or DEFAULT_LENGTH, DEFAULT_PAGE_SIZE),
            max_batch_size=1,
        )


def _settings(llm: ExL2LLM) -> dict[str, str]:
    config = llm.engine_config
    return {"device": config.device, "precision": config.precision, "cache_dtype": config.cache_dtype}


class _Rate(ProgressColumn):
    """Tokens a second, over the last moments."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


@contextmanager
def _progress(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal, nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,}"),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(text, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)
