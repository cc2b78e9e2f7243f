"""Speed on a card: kernels against the memory's and cuBLAS's speed, and the engine on models of known shapes.

    python benchmarks/gpu.py [--quick] [--shapes llama-8b,llama-1.1b] [--bits 4.0] [--no-peers] [--output FILE]

Prints progress on standard error, a short table, and as the last line of standard output one JSON object. Needs torch
for CUDA, the packages of the `cuda` extra and a card; no network. Peers are measured in the same run where they can be
imported. Weights are random: speed does not depend on them.

Kernel times are those of CUDA graphs of twenty launches over as many copies of the weights as it takes to leave the
card's caches behind; medians of five.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.gpu_model import SHAPES, Shape, SpeedModel, random_matrix  # noqa: E402
from exl2_rag.errors import Exl2RagError  # noqa: E402
from exl2_rag.llm.kernels import cuda_attention, cuda_matmul, cuda_runtime  # noqa: E402
from exl2_rag.llm.kernels.cuda_backend import Backend  # noqa: E402
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Scoring  # noqa: E402

GIB = 1 << 30
REPEATS = 5
LAUNCHES = 20
CACHE_BYTES = 256 << 20  # more than the second-level cache of any card
WIDTHS = (2, 3, 4, 5, 6, 8)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MATRIX = (4096, 14336)  # in and out features: gate or up of an 8B model
BATCHES = (1, 8, 32)
PREFILLS = (512, 2048, 8192)
PREFIX_TOKENS = 4096


@dataclass(frozen=True)
class Machine:
    """Where it runs. `on_card` is False in the tests of this file: they use the emulation, whose times say nothing."""

    backend: Backend
    device: torch.device
    on_card: bool = True

    def seconds(self, launch: Callable[[int], object], count: int = LAUNCHES) -> float:
        """Time of one `launch(i)`; on a card `count` of them are captured and replayed."""
        if not self.on_card:
            start = time.perf_counter()
            launch(0)
            return time.perf_counter() - start
        with torch.cuda.device(self.device):
            for number in range(count):
                launch(number)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for number in range(count):
                    launch(number)
            graph.replay()
            times = []
            for _ in range(REPEATS):
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                graph.replay()
                last.record()
                torch.cuda.synchronize()
                times.append(first.elapsed_time(last) / 1000 / count)
        return statistics.median(times)

    def wait(self) -> None:
        if self.on_card:
            torch.cuda.synchronize(self.device)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def copy_bandwidth(machine: Machine, n_bytes: int) -> float:
    """Bytes a second, read and written, of a copy within the card's memory."""
    source = torch.zeros(n_bytes // 4, dtype=torch.int32, device=machine.device)
    target = torch.empty_like(source)
    return 2 * n_bytes / machine.seconds(lambda _number: target.copy_(source), 4)


def library_flops(machine: Machine, rows: int, in_features: int, out_features: int) -> float:
    """Operations a second of the library's float16 product."""
    x = torch.randn((rows, in_features), device=machine.device).half()
    weight = torch.randn((in_features, out_features), device=machine.device).half()
    out = torch.empty((rows, out_features), dtype=torch.float16, device=machine.device)
    seconds = machine.seconds(lambda _number: torch.mm(x, weight, out=out))
    return 2 * rows * in_features * out_features / seconds


def packed_products(
    machine: Machine, widths: tuple[int, ...], rows: tuple[int, ...], matrix: tuple[int, int], bandwidth: float
) -> list[dict[str, Any]]:
    """EXL2 products of one matrix at each width and number of rows."""
    in_features, out_features = matrix
    library = {count: library_flops(machine, count, in_features, out_features) for count in rows}
    results = []
    for bits in widths:
        first = random_matrix(in_features, out_features, [(bits, in_features)], machine.device, seed=bits)
        copies = max(1, min(LAUNCHES, -(-CACHE_BYTES // first.nbytes))) if machine.on_card else 1
        matrices = [first] + [
            random_matrix(in_features, out_features, [(bits, in_features)], machine.device, seed=bits + 100 * number)
            for number in range(1, copies)
        ]
        for count in rows:
            x = torch.randn((count, in_features), device=machine.device).half()
            seconds = machine.seconds(
                lambda number, x=x, matrices=matrices: cuda_matmul.packed_matmul(
                    machine.backend, x, matrices[number % len(matrices)]
                )
            )
            flops = 2 * count * in_features * out_features / seconds
            results.append(
                {
                    "bits": bits,
                    "rows": count,
                    "microseconds": seconds * 1e6,
                    "gb_s": first.nbytes / seconds / 1e9,
                    "bandwidth_share": first.nbytes / seconds / bandwidth,
                    "tflop_s": flops / 1e12,
                    "cublas_fp16_share": flops / library[count],
                }
            )
        say(f"  {bits} bits: " + ", ".join(f"{one['rows']}: {one['gb_s']:.0f} GB/s" for one in results[-len(rows) :]))
    return results


def attention(machine: Machine, batches: tuple[int, ...], context: int, bandwidth: float) -> list[dict[str, Any]]:
    """Decode attention of an 8B model's layer over float16 pages: of each sequence's own, and of shared ones."""
    heads, kv_heads, head_dim, page_size = 32, 8, 128, 32
    results = []
    for batch in batches:
        pages_each = -(-context // page_size)
        shape = (batch * pages_each, page_size, kv_heads, head_dim)
        layers = max(1, -(-CACHE_BYTES // (2 * 2 * batch * context * kv_heads * head_dim))) if machine.on_card else 1
        layers = min(layers, LAUNCHES)
        k_pages = [torch.randn(shape, device=machine.device).half() for _ in range(layers)]
        v_pages = [torch.randn(shape, device=machine.device).half() for _ in range(layers)]
        order = torch.randperm(batch * pages_each).to(torch.int32).view(batch, pages_each).to(machine.device)
        q = torch.randn((batch, heads, head_dim), device=machine.device).half()
        starts = torch.arange(batch + 1, dtype=torch.int32, device=machine.device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=machine.device)
        # The same pages for all sequences: read by each of them, and once for all.
        same = PagedBatch(order[:1].expand(batch, -1).contiguous(), starts, lengths)
        shared = dataclasses.replace(
            same,
            group_starts=torch.tensor([0, batch], dtype=torch.int32, device=machine.device),
            group_prefix_pages=torch.tensor([pages_each - 1], dtype=torch.int32, device=machine.device),
            max_rest=page_size,
        )

        def attend(number: int, *, q: Tensor = q, k: Any = k_pages, v: Any = v_pages, batch: PagedBatch) -> Tensor:
            layer = number % len(k)
            return cuda_attention.paged_attention(
                machine.backend, q, k[layer], v[layer], batch, Scoring(head_dim**-0.5)
            )

        seconds = machine.seconds(partial(attend, batch=PagedBatch(order, starts, lengths)))
        n_bytes = 2 * 2 * batch * context * kv_heads * head_dim
        results.append(
            {
                "batch": batch,
                "context": context,
                "microseconds": seconds * 1e6,
                "gb_s": n_bytes / seconds / 1e9,
                "bandwidth_share": n_bytes / seconds / bandwidth,
                "same_pages_microseconds": machine.seconds(partial(attend, batch=same)) * 1e6,
                "shared_microseconds": machine.seconds(partial(attend, batch=shared)) * 1e6,
            }
        )
    return results


def decode(machine: Machine, model: SpeedModel, batch: int, context: int, n_new: int) -> dict[str, Any]:
    """Tokens a second of all sequences together, by engine steps: graphs, sampling and the wait for each token."""
    engine = model.engine(batch_size=batch, max_seq_len=context + n_new + 8)
    prompts = [model.prompt(context, seed=number) for number in range(batch)]
    sequences = model.start(engine, prompts, n_new)
    # The first steps compute the prompts and record the graph.
    while any(sequence.n_new < 4 for sequence in sequences):
        model.step(engine)
    machine.wait()
    start, before = time.perf_counter(), sum(sequence.n_new for sequence in sequences)
    while engine.has_work:
        model.step(engine)
    machine.wait()
    seconds = time.perf_counter() - start
    tokens = sum(sequence.n_new for sequence in sequences) - before
    steps = tokens / batch
    return {
        "batch": batch,
        "context": context,
        "tok_s": tokens / seconds,
        "ms_per_step": 1000 * seconds / steps,
        "weight_gb_s": model.weight_bytes_per_token * steps / seconds / 1e9,
    }


def prefill(machine: Machine, model: SpeedModel, length: int) -> dict[str, Any]:
    """Tokens a second from a prompt's arrival to its first token, nothing cached."""
    engine = model.engine(batch_size=1, max_seq_len=length + 8)
    model.run(engine, [model.prompt(length, seed=1)], 1)  # compiles and warms up
    times = []
    for number in range(3 if machine.on_card else 1):
        start = time.perf_counter()
        model.run(engine, [model.prompt(length, seed=2 + number)], 1)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    return {
        "tokens": length,
        "tok_s": length / seconds,
        "ms": 1000 * seconds,
        "tflop_s": model.flops(length) / seconds / 1e12,
    }


def first_token(machine: Machine, model: SpeedModel, prefix: int) -> dict[str, Any]:
    """Time to the first token of a prompt with a long prefix: unknown to the cache, and known to it."""
    engine = model.engine(batch_size=1, max_seq_len=prefix + 128)
    model.run(engine, [model.prompt(prefix, seed=1)], 1)
    cold, warm = [], []
    for number in range(3 if machine.on_card else 1):
        document, question = model.prompt(prefix, seed=10 + number), model.prompt(32, seed=20 + number)
        start = time.perf_counter()
        model.run(engine, [(*document, *question)], 1)
        cold.append(time.perf_counter() - start)
        start = time.perf_counter()
        model.run(engine, [(*document, *model.prompt(32, seed=30 + number))], 1)
        warm.append(time.perf_counter() - start)
    cold_s, warm_s = statistics.median(cold), statistics.median(warm)
    return {"prefix": prefix, "cold_ms": 1000 * cold_s, "warm_ms": 1000 * warm_s, "warm_share": warm_s / cold_s}


def measure_model(
    machine: Machine,
    name: str,
    shape: Shape,
    bits: float,
    bandwidth: float,
    *,
    batches: tuple[int, ...],
    prefills: tuple[int, ...],
    prefix: int,
    context: int,
    n_new: int,
) -> dict[str, Any]:
    """Everything about one model."""
    say(f"{name} at {bits} bits a weight")
    start = time.perf_counter()
    model = SpeedModel(shape, bits, machine.backend, machine.device)
    machine.wait()
    result: dict[str, Any] = {
        "shape": asdict(shape),
        "bits_per_weight": model.bits_per_weight,
        "weight_bytes": model.weight_bytes,
        "weight_bytes_per_token": model.weight_bytes_per_token,
        "load_s": time.perf_counter() - start,
        "decode": [],
        "prefill": [],
    }
    for batch in batches:
        one = decode(machine, model, batch, context, n_new)
        one["bandwidth_share"] = one["weight_gb_s"] * 1e9 / bandwidth
        result["decode"].append(one)
        say(f"  decode, batch {batch}: {one['tok_s']:.0f} tokens/s, {one['bandwidth_share']:.0%} of the copy bandwidth")
    for length in prefills:
        one = prefill(machine, model, length)
        result["prefill"].append(one)
        say(f"  prefill {length}: {one['tok_s']:.0f} tokens/s, {one['tflop_s']:.0f} TFLOP/s")
    result["first_token"] = first_token(machine, model, prefix)
    return result


def exllamav2(name: str, bits: float) -> dict[str, Any]:
    """ExLlamaV2 on the same shape, in a process of its own; {"skipped": why} where it cannot run."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "exllamav2_speed.py"), "--shape", name]
    command += ["--bits", str(bits)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=420)
    except subprocess.TimeoutExpired:
        return {"skipped": "it took more than seven minutes"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"skipped": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def describe(machine: Machine, arguments: list[str]) -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True, cwd=ROOT)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"],
        check=False,
        capture_output=True,
        text=True,
    )
    return {
        "benchmark": "gpu",
        "command": " ".join(["python", "benchmarks/gpu.py", *arguments]),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "card": torch.cuda.get_device_name(machine.device),
        "arch": machine.backend.arch,
        "driver": driver.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def table(result: dict[str, Any]) -> str:
    """What matters, short."""
    lines = [f"{result['card']}, driver {result['driver']}", f"copy bandwidth {result['copy_gb_s']:.0f} GB/s"]
    lines.append(
        "EXL2 product, rows:  "
        + "  ".join(f"{rows:>6}" for rows in sorted({one["rows"] for one in result["products"]}))
    )
    for bits in sorted({one["bits"] for one in result["products"]}):
        shares = [one for one in result["products"] if one["bits"] == bits]
        cells = [
            f"{one['bandwidth_share']:>5.0%} " if one["rows"] <= 64 else f"{one['cublas_fp16_share']:>5.0%}*"
            for one in shares
        ]
        lines.append(f"  {bits} bits             " + "  ".join(f"{cell:>6}" for cell in cells))
    lines.append("  (share of the copy bandwidth; * share of cuBLAS fp16)")
    for name, model in result["models"].items():
        peer = model.get("exllamav2", {})
        for one in model["decode"]:
            theirs = next((two["tok_s"] for two in peer.get("decode", []) if two["batch"] == one["batch"]), None)
            ratio = f", {one['tok_s'] / theirs:.2f} x ExLlamaV2" if theirs else ""
            lines.append(
                f"{name} decode, batch {one['batch']}: {one['tok_s']:.0f} tokens/s, "
                f"{one['bandwidth_share']:.0%} of bandwidth{ratio}"
            )
        lines += [
            f"{name} prefill {one['tokens']}: {one['tok_s']:.0f} tokens/s, {one['tflop_s']:.0f} TFLOP/s"
            for one in model["prefill"]
        ]
        ttft = model["first_token"]
        lines.append(
            f"{name} first token after {ttft['prefix']}: cold {ttft['cold_ms']:.1f} ms, warm {ttft['warm_ms']:.1f} ms "
            f"({ttft['warm_share']:.1%})"
        )
        if "skipped" in peer:
            lines.append(f"{name}: ExLlamaV2 was not measured: {peer['skipped']}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Speed on a card.")
    parser.add_argument("--quick", action="store_true", help="fewer widths, rows and lengths")
    parser.add_argument("--shapes", default="llama-1.1b,llama-8b")
    parser.add_argument("--bits", type=float, default=4.0, help="bits a weight of the models")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args(arguments)
    shapes = options.shapes.split(",")
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        parser.error(f"unknown shape {unknown[0]}; known are {', '.join(SHAPES)}")
    try:
        device = torch.device("cuda", 0)
        machine = Machine(cuda_runtime.open_card(0), device)
    except Exl2RagError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 3
    torch.cuda.set_device(device)
    result = describe(machine, arguments)
    say(f"{result['card']} (sm_{result['arch']}), torch {result['torch']}")
    bandwidth = copy_bandwidth(machine, GIB)
    result["copy_gb_s"] = bandwidth / 1e9
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s; products of {MATRIX[0]} x {MATRIX[1]}:")
    widths, rows = ((4,), (1, 8, 32, 2048)) if options.quick else (WIDTHS, ROWS)
    result["products"] = packed_products(machine, widths, rows, MATRIX, bandwidth)
    result["attention"] = attention(machine, BATCHES, PREFIX_TOKENS, bandwidth)
    result["models"] = {}
    for name in shapes:
        result["models"][name] = measure_model(
            machine,
            name,
            SHAPES[name],
            options.bits,
            bandwidth,
            batches=BATCHES,
            prefills=(2048,) if options.quick else PREFILLS,
            prefix=PREFIX_TOKENS,
            context=512,
            n_new=64 if options.quick else 128,
        )
        torch.cuda.empty_cache()
        if not options.no_peers:
            say("  ExLlamaV2 on the same shape")
            result["models"][name]["exllamav2"] = exllamav2(name, options.bits)
    text = json.dumps(result)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
