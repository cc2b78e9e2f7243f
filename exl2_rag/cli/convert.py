"""`exl2-rag convert`: make an EXL2 model of a float one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from exl2_rag.cli.common import JsonOption, command, err, named_bars, out, print_json
from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.llm.quantize.convert import Conversion

_MIB = 1 << 20


@command
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a float16, bfloat16 or float32 model.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Directory for the EXL2 model.", metavar="DST")],
    bits: Annotated[float, typer.Option("--bits", "-b", help="Average bits per weight; the head is extra.")] = 4.0,
    head_bits: Annotated[int, typer.Option(help="Bits of the output head: 2, 3, 4, 5, 6 or 8.")] = 6,
    method: Annotated[
        str, typer.Option(help="“refined” loses least; “reference” is ExLlamaV2's way; “uniform” measures nothing.")
    ] = "refined",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            "-c",
            help="Text, .jsonl or .parquet file, or a folder of documents; may be repeated. Default: a built-in mix.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of calibration text.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    measure_rows: Annotated[int, typer.Option(help="Rows of the measuring pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Of what the built-in mix draws at random.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Most MiB of one tensor file; 0: one file.")] = 8192,
    measurement: Annotated[
        Path | None, typer.Option(help="A measurement.json of ExLlamaV2's form, to skip measuring.")
    ] = None,
    output_measurement: Annotated[
        Path | None, typer.Option(help="Write a measurement.json there (with --method reference).")
    ] = None,
    job: Annotated[Path | None, typer.Option(help="Working directory. Default: DST with .job behind.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run left in it.")] = False,
    keep_job: Annotated[bool, typer.Option("--keep-job", help="Leave the working directory behind.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or such as cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the processors this process may use.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Quantise a model. Stopped at any point, the same command goes on from the last finished block."""
    import torch

    from exl2_rag.llm.kernels.ops import set_num_threads
    from exl2_rag.llm.quantize.convert import convert as convert_model
    from exl2_rag.llm.quantize.options import ConversionOptions, check_method

    options = ConversionOptions(
        bits=bits,
        head_bits=head_bits,
        method=check_method(method),
        rows=rows,
        length=length,
        measure_rows=measure_rows,
        seed=seed,
        shard_bytes=shard_size * _MIB,
    )
    if threads is not None:
        torch.set_num_threads(threads)
        set_num_threads(threads)
    with named_bars(MofNCompleteColumn(), TimeElapsedColumn(), quiet=as_json) as tell:
        result = convert_model(
            source,
            target,
            options,
            job_dir=job,
            texts=None if not calibration else calibration_texts(calibration, quiet=as_json),
            text_source=", ".join(path.name for path in calibration or ()),
            measurement_file=measurement,
            output_measurement=output_measurement,
            device=device,
            fresh=fresh,
            keep_job=keep_job,
            progress=lambda stage, done, total: tell(stage.capitalize(), done, total),
        )
    if as_json:
        print_json(result.to_json())
    else:
        _report(result)


def calibration_texts(paths: list[Path], *, quiet: bool = False) -> Iterator[str]:
    """The texts of files, and of all documents below folders; a document that cannot be read is named and left out.

    Raises:
        SettingsError: there is no such file or folder.
        CalibrationError: a Parquet file cannot be read.
    """
    from exl2_rag.errors import DocumentError
    from exl2_rag.llm.evaluation.corpus import read_texts
    from exl2_rag.llm.quantize.parquet_text import parquet_texts
    from exl2_rag.retrieval.loaders import load_document

    for path in paths:
        if path.suffix == ".parquet":
            yield from parquet_texts(path)
        elif path.is_file():
            yield from (one.text for one in read_texts([path]))
        elif path.is_dir():
            for file in sorted(one for one in path.rglob("*") if one.is_file()):
                try:
                    yield load_document(file, root=path).text
                except DocumentError as error:
                    if not quiet:
                        err.print(f"left out: {error}", style="yellow", markup=False, highlight=False)
        else:
            raise SettingsError(f"there is no file or folder at {path}; give text to calibrate with")


def _report(result: Conversion) -> None:
    table = Table(title=f"{result.target_dir}: {result.bits_per_weight:.3f} bits per weight")
    for column, justify in (("block", "left"), ("bits", "right"), ("error so far", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for block in result.blocks:
        table.add_row(block.block, f"{block.bits_per_weight:.3f}", f"{block.error:.4f}")
    out.print(table)
    quality = result.quality
    out.print(
        f"On the calibration text: perplexity {quality.perplexity_before:.4f} before, {quality.perplexity_after:.4f} "
        f"after; KL {quality.divergence:.6f} nats a token; same first choice {quality.agreement:.2%}."
    )
    out.print(f"{result.n_bytes / _MIB:,.1f} MiB of tensors, {result.seconds:,.0f} s. Compare on other text: eval kl.")
