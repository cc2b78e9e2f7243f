"""`exl2-rag bench`: how fast this machine runs a model, and how much of its memory bandwidth that is."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from exl2_rag.cli.common import JsonOption, busy, command, err, out, print_json
from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.llm.benchmark import BenchmarkRun
    from exl2_rag.llm.read_bandwidth import ReadBandwidth

DEFAULT_SHAPE = "llama-1.1b"
DEFAULT_BPW = 4.5
_STATUS = Path("/proc/self/status")


@command
def bench(
    context: typer.Context,
    shape: Annotated[
        str | None, typer.Option(help=f"A model of random weights: llama-1.1b or llama-8b. Default: {DEFAULT_SHAPE}.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="A model directory instead.")] = None,
    bpw: Annotated[float | None, typer.Option(help=f"Bits per weight of a shape. Default: {DEFAULT_BPW}.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    new: Annotated[int, typer.Option(help="New tokens after it.", min=2)] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="As for ExL2LLM.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: the processors this process may use.", min=1)] = None,
    precision: Annotated[str, typer.Option(help="As for ExL2LLM.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Measured runs; their medians are shown.", min=1)] = 5,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where models of a shape are kept. Default: synthetic/ in EXL2_RAG_CACHE, ~/.cache/exl2-rag."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed, memory bandwidth and memory use of a model.

    Every run has new random prompts, so none finds anything in the cache. Decode is timed from the first new token on.
    """
    if context.invoked_subcommand is not None:
        return
    if model is not None and (shape is not None or bpw is not None):
        raise SettingsError("give a model directory (--model) or a shape (--shape, --bpw), not both")
    if model is None:
        shape = shape or DEFAULT_SHAPE
        model = synthetic_model(cache_dir or default_cache_dir(), shape, DEFAULT_BPW if bpw is None else bpw)
    result: dict[str, Any] = {"shape": shape, "model": model.resolve().name}
    result |= _measure(
        model,
        prompt=prompt,
        new=new,
        batch=batch,
        device=device,
        threads=threads,
        precision=precision,
        repeats=repeats,
    )
    (err if as_json else out).print(_table(result))
    if as_json:
        print_json(result)


def _measure(
    model_dir: Path,
    *,
    prompt: int,
    new: int,
    batch: int,
    device: str,
    threads: int | None,
    precision: str,
    repeats: int,
) -> dict[str, Any]:
    """Load the model, run the benchmark, and put the figures together."""
    from exl2_rag import ExL2LLM
    from exl2_rag.llm.benchmark import EngineBenchmark, cache_tokens_for, model_bytes
    from exl2_rag.llm.engine_config import DEFAULT_PAGE_SIZE
    from exl2_rag.llm.kernels import native
    from exl2_rag.llm.read_bandwidth import measure_read_bandwidth

    sizes = model_bytes(model_dir)
    threads = native.default_num_threads() if threads is None else threads
    kernels = native.cpu_level() if native.native_available() else "reference"
    baseline = _status_bytes("VmRSS")
    runs: list[BenchmarkRun] = []
    bandwidths: list[ReadBandwidth] = []
    peak: int | None = None
    with ExL2LLM(
        model_dir,
        device=device,
        cache_tokens=cache_tokens_for(prompt, new, batch, DEFAULT_PAGE_SIZE),
        max_batch_size=batch,
        num_threads=threads,
        precision=precision,
    ) as llm:
        benchmark = EngineBenchmark(llm, prompt_tokens=prompt, new_tokens=new, batch_size=batch)
        # The first run loads what is loaded at first use. What memory the buffer of the bandwidth takes later is not
        # the engine's, so the peak is read before.
        with busy("Warming up"):
            benchmark.run()
        peak = _status_bytes("VmHWM")
        for repeat in range(repeats):
            with busy(f"Run {repeat + 1} of {repeats}"):
                runs.append(benchmark.run())
                bandwidths.append(measure_read_bandwidth(threads))
        report, config = llm.cache_report(), llm.engine_config
    decode = statistics.median(run.decode_tok_s for run in runs)
    bandwidth = statistics.median(one.bytes_per_second for one in bandwidths)
    return {
        "bpw": round(sizes.bits_per_weight, 4),
        "device": config.device,
        "precision": config.precision,
        "kernels": kernels,
        "threads": threads,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "batch_size": batch,
        "repeats": repeats,
        "decode_tok_s": round(decode, 2),
        "prefill_tok_s": round(statistics.median(run.prefill_tok_s for run in runs), 1),
        "first_token_ms": round(statistics.median(run.prefill_s for run in runs) * 1e3, 1),
        "token_ms": round(statistics.median(gap for run in runs for gap in run.token_s) * 1e3, 3),
        "weight_bytes_per_token": sizes.weight_bytes_per_token,
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "bandwidth_method": statistics.mode(one.method for one in bandwidths),
        # A step reads the weights once for all its sequences.
        "bandwidth_share": round(
            statistics.median(
                run.decode_tok_s / batch * sizes.weight_bytes_per_token / one.bytes_per_second
                for run, one in zip(runs, bandwidths, strict=True)
            ),
            4,
        ),
        "peak_memory_bytes": peak,
        "baseline_memory_bytes": baseline,
        "model_file_bytes": sizes.file_bytes,
        "kv_cache_bytes": report.size_bytes,
        "memory_ratio": None
        if peak is None or baseline is None
        else round((peak - baseline) / (sizes.file_bytes + report.size_bytes), 4),
        "runs": [
            {
                "decode_tok_s": round(run.decode_tok_s, 2),
                "prefill_tok_s": round(run.prefill_tok_s, 1),
                "first_token_ms": round(run.prefill_s * 1e3, 1),
                "token_ms": round(statistics.median(run.token_s) * 1e3, 3),
                "bandwidth_gb_s": round(one.bytes_per_second / 1e9, 2),
            }
            for run, one in zip(runs, bandwidths, strict=True)
        ],
    }


def default_cache_dir() -> Path:
    """Where models of a shape are kept unless told otherwise.

    Raises:
        SettingsError: there is no home directory.
    """
    chosen = os.environ.get("EXL2_RAG_CACHE")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache" / "exl2-rag") / "synthetic"
    except RuntimeError as error:
        raise SettingsError(f"there is no home directory to keep models in ({error}); give --cache-dir") from error


def synthetic_model(cache_dir: Path, name: str, bpw: float) -> Path:
    """The model of a shape; if it has to be written, then in a process of its own, whose memory is not measured.

    Raises:
        SettingsError: no such shape, or bits per weight that it cannot have.
    """
    from exl2_rag.llm.quantize import synthetic

    shape = synthetic.shape_by_name(name)
    target = synthetic.synthetic_model_dir(cache_dir, name, bits=bpw)
    if not synthetic.is_complete(target):
        context = multiprocessing.get_context("spawn")
        with busy(f"Writing {name} at {bpw:g} bits per weight"), ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(synthetic.ensure_synthetic_model, target, shape, bits=bpw).result()
    return target


def _status_bytes(field: str) -> int | None:
    """A field of this process's memory status, or None where the system does not have it."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _table(result: Mapping[str, Any]) -> Table:
    title = f"{result['model']}: {result['bpw']:.2f} bits per weight, {result['threads']} threads, "
    title += f"{result['kernels']} kernels, precision {result['precision']}, batch {result['batch_size']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "prefill tokens/s", "first token ms", "decode tokens/s", "bandwidth GB/s"):
        table.add_column(column, justify="right" if column else "left")
    for index, run in enumerate((*result["runs"], result)):
        name = "median" if run is result else str(index + 1)
        figures = (run["prefill_tok_s"], run["first_token_ms"], run["decode_tok_s"], run["bandwidth_gb_s"])
        table.add_row(name, *(f"{figure:,.1f}" for figure in figures), end_section=index + 1 == len(result["runs"]))
    mega = 1e-6
    table.caption = (
        f"{result['weight_bytes_per_token'] * mega:,.0f} MB read a token: {result['bandwidth_share']:.0%} of the "
        f"bandwidth. Files {result['model_file_bytes'] * mega:,.0f} MB, cache {result['kv_cache_bytes'] * mega:,.0f} MB"
    )
    if result["peak_memory_bytes"] is not None:
        table.caption += f", peak memory {result['peak_memory_bytes'] * mega:,.0f} MB"
        table.caption += f" ({result['memory_ratio']:.2f} times files and cache without the libraries)"
    table.caption_justify = "left"
    return table
