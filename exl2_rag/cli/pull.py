"""`exl2-rag pull`: fetch a model from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, TransferSpeedColumn

from exl2_rag.cli.common import JsonOption, command, named_bars, out, print_json

DEFAULT_MODELS = Path("models")


@command
def pull(
    model: Annotated[str, typer.Argument(help="owner/name, or owner/name:revision.", metavar="REPO[:REVISION]")],
    directory: Annotated[
        Path | None, typer.Option("--directory", "-d", help="Where it goes. Default: models/NAME.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", help="For private and gated repositories.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model, EXL2 or one to convert. Run again, it goes on where it stopped and fetches only what is new."""
    from exl2_rag.llm.checkpoint import Checkpoint
    from exl2_rag.llm.hub import HubModel, fetch

    wanted = HubModel.parse(model)
    with named_bars(DownloadColumn(), TransferSpeedColumn(), quiet=as_json) as tell:
        target = fetch(wanted, directory or DEFAULT_MODELS / wanted.directory_name, token=token, progress=tell)
    checkpoint = Checkpoint.open(target)  # a file that was damaged on the way shows here
    if as_json:
        print_json({"directory": target, "tensor_bytes": checkpoint.total_bytes()})
    else:
        out.print(f"{target}: {checkpoint.total_bytes() / 2**20:,.1f} MiB of tensors", highlight=False)
