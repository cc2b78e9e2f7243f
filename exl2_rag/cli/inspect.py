"""`exl2-rag inspect`: what is in a model directory, and what will fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from exl2_rag.cli.common import JsonOption, command, out, print_json

if TYPE_CHECKING:
    from exl2_rag.llm.checkpoint.inspect import ModelReport


@command
def inspect(
    model_dir: Annotated[Path, typer.Argument(help="Model directory.")],
    as_json: JsonOption = False,
) -> None:
    """Show a model's architecture, bits per layer kind, sizes, and what will fit. Loads no weights."""
    from exl2_rag.llm.checkpoint.inspect import inspect_model

    report = inspect_model(model_dir)
    if as_json:
        print_json(report)
        return
    _print_head(report)
    out.print(_roles(report))
    if report.kv_bytes_per_token:
        sizes = ", ".join(f"{dtype} {size(n)}" for dtype, n in report.kv_bytes_per_token.items())
        out.print(f"KV cache of one token: {sizes}")
    if report.fits:
        out.print(_fits(report))


def size(n_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def _print_head(report: ModelReport) -> None:
    out.print(Text(str(report.model_dir), style="bold"))
    bits = f", {report.bits_per_weight:.2f} bits a weight" if report.bits_per_weight is not None else ""
    if report.requested_bits is not None:
        bits += f" (asked for {report.requested_bits:g}"
        bits += f", head {report.requested_head_bits:g})" if report.requested_head_bits is not None else ")"
    files = "1 file" if report.n_files == 1 else f"{report.n_files} files"
    out.print(f"{report.architecture}, {report.n_parameters / 1e6:.1f} M parameters{bits}")
    out.print(f"{size(report.weight_bytes)} in {files}")
    if report.config is not None:
        config = report.config
        out.print(
            f"{config.n_layers} layers, width {config.hidden_size}, {config.n_heads} heads of {config.head_dim}, "
            f"{config.n_kv_heads} for keys and values, {config.vocab_size} tokens, context {config.max_seq_len}"
        )
    if report.problem is not None:
        out.print(Text(f"cannot be run: {report.problem}", style="bold red"))


def _roles(report: ModelReport) -> Table:
    table = Table()
    table.add_column("matrices")
    table.add_column("stored as")
    for column in ("how many", "size", "bits a weight"):
        table.add_column(column, justify="right")
    table.add_column("widths")
    for role in report.roles:
        widths = ", ".join(f"{bits} bits {share:.0%}" for bits, share in role.widths)
        numbers = (str(role.n_matrices), size(role.n_bytes), f"{role.bits_per_weight:.2f}")
        table.add_row(role.role, ", ".join(role.kinds), *numbers, widths)
    return table


def _fits(report: ModelReport) -> Table:
    table = Table(title="What fits beside the weights (fp16 cache)", title_justify="left")
    table.add_column("device")
    for column in ("memory", "cache tokens", "sequences of full length"):
        table.add_column(column, justify="right")
    for fit in report.fits:
        tokens = f"{fit.cache_tokens:,}" if fit.cache_tokens else "does not fit"
        sequences = f"{fit.sequences:,.1f}" if fit.cache_tokens else ""
        table.add_row(fit.device, size(fit.memory_bytes), tokens, sequences)
    return table
