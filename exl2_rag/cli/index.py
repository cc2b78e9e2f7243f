"""`exl2-rag index`: read a folder of documents into an index, or bring one up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from exl2_rag.cli.common import DEFAULT_INDEX, IndexOption, JsonOption, SettingsOption, command, err, out, print_json
from exl2_rag.settings import load_settings

if TYPE_CHECKING:
    from exl2_rag.retrieval import DocumentIndex, IndexReport

SHOWN_REFUSALS = 20


@command
def index(
    folder: Annotated[Path, typer.Argument(help="Folder of documents; its subfolders too.")],
    index: IndexOption = DEFAULT_INDEX,
    settings: SettingsOption = "default",
    kv_store: Annotated[
        Path | None,
        typer.Option(help="Store of KV pages; changed and removed documents are erased from it. [default: settings]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Index a folder of documents; run it again after changes, only what changed is read."""
    from exl2_rag.cli.options import make_index
    from exl2_rag.qa.kv_sources import purge_changed

    loaded = load_settings(settings)
    store = kv_store or (Path(loaded.engine.kv_store) if loaded.engine.kv_store else None)
    with make_index(index, loaded) as opened:
        report = update_index(opened, folder, quiet=as_json)
        n_purged = purge_changed(store.expanduser(), opened, report) if store is not None else 0
    if n_purged and not as_json:
        out.print(f"{n_purged} pages of changed and removed documents erased from the KV store")
    if as_json:
        print_json(report)
    else:
        print_report(report)


def update_index(index: DocumentIndex, folder: Path, *, quiet: bool = False) -> IndexReport:
    """Bring an index up to date with a folder, with a progress bar on a terminal."""
    if quiet or not err.is_terminal:
        return index.update(folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("Indexing", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"Indexing {name}")

        return index.update(folder, progress=show)


def print_report(report: IndexReport) -> None:
    """What was read, what was not, and why."""
    counts = f"{len(report.indexed)} indexed, {len(report.unchanged)} unchanged, {len(report.removed)} removed"
    out.print(f"{counts}; {report.n_chunks} chunks in the index")
    if not report.refused:
        return
    out.print(Text(f"{len(report.refused)} files were not read:", style="yellow"))
    for refusal in report.refused[:SHOWN_REFUSALS]:
        out.print(Text(f"  {refusal.path}: {refusal.message} [{refusal.reason}]", style="yellow"))
    if len(report.refused) > SHOWN_REFUSALS:
        out.print(Text(f"  … and {len(report.refused) - SHOWN_REFUSALS} more; --json lists all", style="yellow"))
