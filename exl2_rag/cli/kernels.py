"""`exl2-rag kernels`: compile the CUDA kernels ahead of time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from exl2_rag.cli.common import JsonOption, command, err, out, print_json

if TYPE_CHECKING:
    from exl2_rag.llm.kernels.cuda_compiler import BuildResult

app = typer.Typer(help="Compile the CUDA kernels ahead of time; needs no GPU.", no_args_is_help=True)


@app.callback()
def kernels() -> None:
    """Compile the CUDA kernels ahead of time; needs no GPU."""


@app.command("build")
@command
def build(
    arch: Annotated[
        str,
        typer.Option(help="Architectures, separated by commas, such as sm_80,sm_90; 'all' is every tested one."),
    ] = "all",
    module: Annotated[list[str] | None, typer.Option(help="Only this module; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile at the same time.")] = os.cpu_count() or 1,
    as_json: JsonOption = False,
) -> None:
    """Compile every kernel into the cache and show what it takes: registers, shared memory, spills.

    Ends with 1 if a kernel does not compile.
    """
    from exl2_rag.llm.kernels import cuda_compiler

    cuda_compiler.Nvrtc()  # without the extra: one error, not one a module
    results = cuda_compiler.build_all(architectures(arch), module, jobs=jobs)
    failed = [result for result in results if result.error is not None]
    if as_json:
        print_json({"kernels": _records(results), "errors": [result.error for result in failed]})
    else:
        out.print(_table(results))
        for result in failed:
            err.print(Text(f"{result.module} for sm_{result.arch}: {result.error}", style="red"))
    if failed:
        raise typer.Exit(1)


def architectures(text: str) -> list[int]:
    """ "sm_80,sm_90" as numbers.

    Raises:
        SettingsError: one is not an architecture, or older than what kernels are written for.
    """
    from exl2_rag.errors import SettingsError
    from exl2_rag.llm.kernels.cuda_backend import ARCHITECTURES, MIN_ARCHITECTURE

    if text == "all":
        return list(ARCHITECTURES)
    found = []
    for part in text.split(","):
        name = part.strip()
        digits = name.removeprefix("sm_")
        if not digits.isdecimal() or int(digits) < MIN_ARCHITECTURE:
            raise SettingsError(
                f"--arch takes architectures from sm_{MIN_ARCHITECTURE} up, such as sm_80,sm_90, or 'all'; got '{name}'"
            )
        found.append(int(digits))
    return found


def _records(results: list[BuildResult]) -> list[dict[str, object]]:
    return [
        {
            "module": result.module,
            "arch": f"sm_{result.arch}",
            "kernel": kernel.name,
            "registers": kernel.registers,
            "shared_bytes": kernel.shared_bytes,
            "stack_bytes": kernel.stack_bytes,
            "spill_bytes": kernel.spill_bytes,
        }
        for result in results
        if result.compiled is not None
        for kernel in result.compiled.kernels
    ]


def _table(results: list[BuildResult]) -> Table:
    table = Table()
    table.add_column("kernel", no_wrap=True)
    table.add_column("arch", no_wrap=True)
    for column in ("registers", "shared\nbytes", "stack\nbytes", "spilled\nbytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for record in _records(results):
        spills = Text(str(record["spill_bytes"]), style="bold red" if record["spill_bytes"] else "")
        numbers = (str(record[name]) for name in ("registers", "shared_bytes", "stack_bytes"))
        table.add_row(str(record["kernel"]), str(record["arch"]), *numbers, spills)
    return table
