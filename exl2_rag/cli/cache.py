"""`exl2-rag cache`: what a store of KV pages on disk holds, whether it is sound, and what a prompt would find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from exl2_rag.cli.common import (
    JsonOption,
    ModelOption,
    SettingsOption,
    busy,
    command,
    err,
    open_llm,
    out,
    print_json,
)
from exl2_rag.cli.inspect import size
from exl2_rag.errors import KVStoreError, RequestError
from exl2_rag.settings import load_settings

if TYPE_CHECKING:
    from exl2_rag.llm.cache_explanation import CacheExplanation
    from exl2_rag.llm.cache_report import CacheReport
    from exl2_rag.llm.chat_template import Message
    from exl2_rag.llm.kv_store.store_directory import StoredIdentity

app = typer.Typer(help="Look into a store of KV pages, and see what a prompt would find.", no_args_is_help=True)

StoreArgument = Annotated[Path, typer.Argument(help="Directory that was given as kv_store.")]


@app.callback()
def cache() -> None:
    """Look into a store of KV pages, and see what a prompt would find."""


@app.command("show")
@command
def show(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what a store holds: models, pages, bytes, and documents."""
    from exl2_rag.llm.kv_store.store_directory import stored_identities

    found = stored_identities(store)
    if as_json:
        print_json({"store": store, "models": [_record(one) for one in found]})
        return
    if not found:
        out.print(f"{store} holds nothing.")
        return
    out.print(_table(found))
    for one in found:
        if one.sources:
            named = sorted(one.sources.items(), key=lambda pair: -pair[1])
            shown = ", ".join(f"{source} ({count})" for source, count in named[:10])
            rest = f" and {len(named) - 10} more" if len(named) > 10 else ""
            out.print(Text(f"{one.folder.name[:8]}: pages of {shown}{rest}"))


@app.command("verify")
@command
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read every page and compare its checksum; damaged ones are deleted. Ends with 1 if there were any."""
    results: dict[str, dict[str, Any]] = {}
    for one in _readable(store):
        with busy(f"Reading {one.folder.name[:8]}", quiet=as_json):
            disk = _open(store, one)
            try:
                n_sound, n_damaged = disk.verify()
                results[one.folder.name] = {"sound": n_sound, "damaged": n_damaged, "deleted": disk.is_writing}
            finally:
                disk.close()
    n_bad = sum(counts["damaged"] for counts in results.values())
    if as_json:
        print_json({"store": store, "models": results})
    for name, counts in results.items():
        if not as_json:
            fate = "deleted" if counts["deleted"] else "left, another process writes to the store"
            note = f", {counts['damaged']} damaged ({fate})" if counts["damaged"] else ""
            out.print(f"{name[:8]}: {counts['sound']} pages sound{note}")
    if n_bad:
        raise typer.Exit(1)


@app.command("purge")
@command
def purge(
    store: StoreArgument,
    source: Annotated[str, typer.Argument(help="The document, as requests named it in `sources`.")],
    as_json: JsonOption = False,
) -> None:
    """Erase every page made from a document, for all models; nothing of it is left on the disk."""
    n_pages = 0
    for one in _readable(store):
        disk = _open(store, one)
        try:
            n_pages += disk.purge(source)
        finally:
            disk.close()
    if as_json:
        print_json({"store": store, "source": source, "purged_pages": n_pages})
    else:
        out.print(f"{n_pages} pages of {source} erased", markup=False)


@app.command("clear")
@command
def clear(
    store: StoreArgument,
    model: Annotated[str, typer.Option("--only", help="Only the folder whose name begins so; `show` lists them.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete all pages of a store, or those of one model. What is deleted is computed again when it is needed."""
    from exl2_rag.llm.kv_store.store_directory import remove_folder, stored_identities

    found = [one for one in stored_identities(store) if one.folder.name.startswith(model)]
    if model and not found:
        raise KVStoreError(f"{store} has no folder that begins with {model!r}; `exl2-rag cache show` lists them")
    n_bytes = sum(one.file_bytes for one in found)
    if found and not yes and not typer.confirm(f"Delete {len(found)} folders, {size(n_bytes)}?", err=True):
        raise typer.Exit(1)
    kept = [one.folder.name for one in found if not remove_folder(one.folder)]
    if kept:
        raise KVStoreError(f"in use by another process, and kept: {', '.join(kept)}; close it and try again")
    if as_json:
        print_json({"store": store, "deleted": [one.folder.name for one in found], "bytes": n_bytes})
    else:
        out.print(f"{len(found)} folders deleted, {size(n_bytes)}")


@app.command("explain")
@command
def explain(
    prompt_file: Annotated[
        Path, typer.Option("--prompt-file", "-p", help="A text, or a .json file with a list of chat messages.")
    ],
    model: ModelOption = None,
    store: Annotated[Path | None, typer.Option("--kv-store", help="Directory of the store.")] = None,
    warm: Annotated[
        list[Path] | None,
        typer.Option("--after", help="A prompt computed before, to compare with; may be repeated."),
    ] = None,
    salt: Annotated[str | None, typer.Option("--salt", help="The tenant.")] = None,
    settings: SettingsOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Say what a prompt would find in the cache, where it differs from the nearest cached text, and why."""
    prompts = [_prompt(path) for path in (*(warm or []), prompt_file)]
    options = {} if store is None else {"kv_store": store}
    with open_llm(model, load_settings(settings), quiet=as_json, **options) as llm:
        for one in prompts[:-1]:
            llm.warm(one, cache_salt=salt)
        found = llm.explain_cache(prompts[-1], cache_salt=salt)
        report = llm.cache_report()
    if as_json:
        print_json({"explanation": found.as_dict(), "report": report_record(report)})
        return
    _print_explanation(found)
    if report.tiers is not None and report.tiers.store is not None:
        held = report.tiers.store
        err.print(f"the store holds {held.pages} pages of this model, {size(held.file_bytes)}", style="dim")


def report_record(report: CacheReport) -> dict[str, Any]:
    """A report with the figures that follow from it."""
    fields = {name: getattr(report, name) for name in report.__dataclass_fields__}
    return {**fields, "hit_rate": report.hit_rate, "prefill_saved_s": report.prefill_saved_s}


def _print_explanation(found: CacheExplanation) -> None:
    for line in str(found).splitlines():
        out.print(Text(line), soft_wrap=True)


def _prompt(path: Path) -> str | list[Message]:
    """A text, or the messages of a chat."""
    try:
        text = path.read_text(encoding="utf-8")
        messages = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise RequestError(f"expected a prompt in {path}, a UTF-8 text or JSON: {error}") from error
    if messages is None:
        return text
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise RequestError(f'{path} must hold a list of messages such as {{"role": "user", "content": "…"}}')
    return messages


def _readable(store: Path) -> list[StoredIdentity]:
    """The models of a store whose manifest says what they are; the others are named."""
    from exl2_rag.llm.kv_store.store_directory import stored_identities

    found = stored_identities(store)
    for one in found:
        if one.manifest is None:
            err.print(f"{one.folder.name} has no readable manifest and is left alone; `cache clear` deletes it")
    return [one for one in found if one.manifest is not None]


def _open(store: Path, one: StoredIdentity) -> Any:
    from exl2_rag.llm.kv_store.disk_store import DiskStore
    from exl2_rag.llm.kv_store.store_directory import StoreIdentity

    manifest = one.manifest or {}
    try:
        identity = StoreIdentity(
            bytes.fromhex(manifest["fingerprint"]), manifest["page_size"], manifest["image_bytes"], manifest["identity"]
        )
        is_ours = json.loads(json.dumps(identity.manifest())) == manifest
    except (KeyError, TypeError, ValueError):
        is_ours = False
    if not is_ours:  # a store that is opened for writing empties such a folder; looking in must not
        raise KVStoreError(
            f"the manifest in {one.folder} is of another version or damaged; `exl2-rag cache clear --only "
            f"{one.folder.name[:8]}` deletes the folder"
        )
    return DiskStore(store, identity, quota_bytes=2**62)  # looking in must not evict


def _record(one: StoredIdentity) -> dict[str, Any]:
    manifest = one.manifest or {}
    return {
        "folder": one.folder.name,
        "identity": manifest.get("identity"),
        "page_size": manifest.get("page_size"),
        "pages": one.n_pages,
        "tokens": _tokens(one),
        "bytes": one.file_bytes,
        "sources": one.sources,
        "in_use": one.is_open,
    }


def _tokens(one: StoredIdentity) -> int | None:
    page_size = (one.manifest or {}).get("page_size")
    return None if one.n_pages is None or not isinstance(page_size, int) else one.n_pages * page_size


def _table(found: list[StoredIdentity]) -> Table:
    table = Table()
    for column in ("folder", "model", "cache"):
        table.add_column(column)
    for column in ("pages", "tokens", "on disk", "documents"):
        table.add_column(column, justify="right")
    table.add_column("in use")
    for one in found:
        identity = (one.manifest or {}).get("identity") or {}
        shape = identity.get("model") or {}
        name = f"{shape.get('architecture', 'unreadable')}, {shape.get('n_layers', '?')} layers"
        kept = f"{identity.get('cache_dtype', '?')}, pages of {identity.get('page_size', '?')}"
        counts = (one.n_pages, _tokens(one))
        table.add_row(
            one.folder.name[:8],
            Text(name),
            Text(kept),
            *("?" if count is None else f"{count:,}" for count in counts),
            size(one.file_bytes),
            f"{len(one.sources):,}",
            "yes" if one.is_open else "",
        )
    return table
