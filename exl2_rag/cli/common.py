"""What the commands share: options, how results and errors are shown, how a model is opened."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from exl2_rag.errors import Exl2RagError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

out = Console()
"""Results."""
err = Console(stderr=True)
"""Progress, notices and errors: never mixed into a result that is piped on."""

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", envvar="EXL2_RAG_MODEL", help="Model directory. Left out: the demo model."),
]
SettingsOption = Annotated[
    str,
    typer.Option("--settings", "-s", envvar="EXL2_RAG_SETTINGS", help="A settings file or the name of a built-in one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
IndexOption = Annotated[
    Path,
    typer.Option("--index", "-i", envvar="EXL2_RAG_INDEX", help="Directory of the document index."),
]
DEFAULT_INDEX = Path(".exl2-rag/index")


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Show our own errors as one line and exit with 1; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        try:
            return function(*args, **kwargs)
        except Exl2RagError as error:
            if kwargs.get("as_json"):
                print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
            else:
                err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            err.print("stopped")
            raise typer.Exit(130) from None

    return wrapper


def print_json(value: Any) -> None:
    """One JSON object on standard output; dataclasses and paths are turned into plain values."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=_plain) + "\n")


def open_llm(model: Path | None, settings: Settings, *, quiet: bool = False, **options: Any) -> ExL2LLM:
    """Load a model with the `[engine]` settings and further options; without one the demo model, which is said."""
    from exl2_rag import ExL2LLM
    from exl2_rag.demo import model_dir

    if model is None:
        model = model_dir()
        if not quiet:
            err.print("No --model given: using the demo model, which only quotes short passages.", style="dim")
    with busy(f"Loading {model.name}", quiet=quiet):
        return ExL2LLM(model, **{**settings.engine.model_dump(), **options})


@contextmanager
def busy(text: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    if quiet or not err.is_terminal:
        yield
        return
    with err.status(text):
        yield


@contextmanager
def named_bars(*columns: ProgressColumn, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each name that is told, as (name, done, in all), on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown, console=err, disable=quiet or not err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        yield tell


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return {name: getattr(value, name) for name in names}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
