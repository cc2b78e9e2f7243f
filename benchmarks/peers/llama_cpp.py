"""llama.cpp beside us: models of one shape with random weights, measured in turn in the same run.

    python benchmarks/peers/llama_cpp.py --peer-python PEER/bin/python [--shape NAME] [--compare BPW:QUANT ...]
        [--pairs N] [--threads N] [--prompt N] [--new N] [--precision P] [--cache-dir DIR]

The peer has an interpreter of its own, with llama-cpp-python built from source for this processor, and gguf:

    python3 -m venv PEER
    CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON" \\
        PEER/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf numpy

Each comparison takes one of our models (bits per weight of the decoder) and one of theirs (Q4_K_M, Q2_K or Q4_0, with
the types that llama.cpp's quantiser gives each matrix). Both are loaded, warmed up, and then measured in pairs: ours,
theirs, ours, theirs, so that both meet the same disturbances. Ours is what `exl2-rag bench` measures: the engine
through `ExL2LLM.stream`, greedy, prompts of random tokens. Theirs are bare `llama_decode` calls without any sampling.
Whether llama.cpp does better with flash attention or without, and with its weights repacked at load or not, differs
between prefill and decode, so all four settings are tried first, and each figure takes the one that is best for it;
everything else is at llama.cpp's defaults.

Prints a table to stderr and one JSON object as the last line. A ratio is the median over the pairs of ours / theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from exl2_rag import ExL2LLM
from exl2_rag.cli.bench import default_cache_dir, synthetic_model
from exl2_rag.llm.benchmark import EngineBenchmark, cache_tokens_for, model_bytes
from exl2_rag.llm.kernels import native
from exl2_rag.llm.quantize.synthetic import SHAPES
from exl2_rag.llm.read_bandwidth import measure_read_bandwidth

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
COMPARISONS = ("4.5:Q4_K_M", "2.5:Q2_K", "4.5:Q4_0")
PAGE_SIZE = 32
TRIALS, TRIAL_NEW = 2, 24


class Peer:
    """The worker under the peer's interpreter, with a model loaded."""

    def __init__(self, python: str, gguf: Path, *, threads: int, prompt: int, new: int) -> None:
        command = [python, str(WORKER), "serve", str(gguf), str(threads), str(prompt), str(new)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = self._read()

    def run(self, setting: str, new: int) -> dict[str, Any]:
        """One prompt and new tokens with a setting."""
        self._pipe(self._process.stdin).write(json.dumps({"setting": setting, "new": new}) + "\n")
        self._pipe(self._process.stdin).flush()
        return self._read()

    def close(self) -> None:
        """End the worker."""
        self._pipe(self._process.stdin).close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise SystemExit(f"the peer's worker ended with exit code {self._process.wait()}")
        return dict(json.loads(line))

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def gguf_model(python: str, cache_dir: Path, shape: str, quant: str) -> Path:
    """The peer's model, written when it is not there yet."""
    path = cache_dir / f"{shape}-{quant}-v1.gguf"
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        sizes = json.dumps(asdict(SHAPES[shape]))
        subprocess.run([python, str(WORKER), "write", str(path), quant, sizes], check=True)
    return path


@contextmanager
def opened_peer(options: argparse.Namespace, quant: str) -> Any:
    gguf = gguf_model(options.peer_python, options.cache_dir, options.shape, quant)
    peer = Peer(options.peer_python, gguf, threads=options.threads, prompt=options.prompt, new=options.new)
    try:
        yield peer
    finally:
        peer.close()


def best_settings(peer: Peer, options: argparse.Namespace) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """The setting that is fastest at each figure, and what all of them reached."""
    reached: dict[str, dict[str, float]] = {}
    for _ in range(TRIALS):
        for setting in peer.about["settings"]:
            for figure, value in rates(peer.run(setting, min(options.new, TRIAL_NEW)), options).items():
                of_figure = reached.setdefault(figure, {})
                of_figure[setting] = round(max(value, of_figure.get(setting, 0.0)), 2)
    return {figure: max(found, key=found.__getitem__) for figure, found in reached.items()}, reached


def run_peer(peer: Peer, settings: dict[str, str], options: argparse.Namespace) -> dict[str, float]:
    """Both figures, each with its best setting."""
    run = rates(peer.run(settings["decode_tok_s"], options.new), options)
    if settings["prefill_tok_s"] != settings["decode_tok_s"]:
        run["prefill_tok_s"] = rates(peer.run(settings["prefill_tok_s"], 2), options)["prefill_tok_s"]
    return run


def compare(bpw: float, quant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one of our models and one of theirs in pairs."""
    model_dir = synthetic_model(options.cache_dir, options.shape, bpw)
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    bandwidths: list[float] = []
    with (
        opened_peer(options, quant) as peer,
        ExL2LLM(
            model_dir,
            device="cpu",
            num_threads=options.threads,
            precision=options.precision,
            cache_tokens=cache_tokens_for(options.prompt, options.new, 1, PAGE_SIZE),
            page_size=PAGE_SIZE,
            max_batch_size=1,
        ) as llm,
    ):
        settings, reached = best_settings(peer, options)
        benchmark = EngineBenchmark(llm, prompt_tokens=options.prompt, new_tokens=options.new)
        benchmark.run()
        for _ in range(options.pairs):
            run = benchmark.run()
            ours.append({"decode_tok_s": run.decode_tok_s, "prefill_tok_s": run.prefill_tok_s})
            theirs.append(run_peer(peer, settings, options))
            bandwidths.append(measure_read_bandwidth(options.threads).bytes_per_second)
        precision = llm.engine_config.precision
    sizes = model_bytes(model_dir)
    shares = [
        one["decode_tok_s"] * sizes.weight_bytes_per_token / bandwidth
        for one, bandwidth in zip(ours, bandwidths, strict=True)
    ]
    result: dict[str, Any] = {
        "shape": options.shape,
        "bpw": round(sizes.bits_per_weight, 3),
        "quant": quant,
        "precision": precision,
        "weight_bytes_per_token": sizes.weight_bytes_per_token,
        "bandwidth_gb_s": median([bandwidth / 1e9 for bandwidth in bandwidths]),
        "bandwidth_share": median(shares),
        "peer_model_bytes": peer.about["model_bytes"],
        "peer_version": peer.about["version"],
        "peer_system": peer.about["system"],
    }
    for figure, setting in settings.items():
        pairs = [(mine[figure], yours[figure]) for mine, yours in zip(ours, theirs, strict=True)]
        result[figure] = {
            "ours": median([mine for mine, _ in pairs]),
            "theirs": median([yours for _, yours in pairs]),
            "ratio": median([mine / yours for mine, yours in pairs]),
            "pairs": [[round(mine, 2), round(yours, 2)] for mine, yours in pairs],
            "their_setting": setting,
            "their_trials": reached[figure],
        }
    return result


def rates(run: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    return {
        "decode_tok_s": len(run["token_s"]) / run["decode_s"],
        "prefill_tok_s": options.prompt / run["prefill_s"],
    }


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def show(result: dict[str, Any]) -> None:
    ours = f"ours {result['bpw']:.2f} bpw ({result['precision']})"
    for figure in ("decode_tok_s", "prefill_tok_s"):
        numbers = result[figure]
        theirs = f"llama.cpp {result['quant']:6} {numbers['theirs']:8.1f}"
        line = f"{result['shape']} {figure:13}  {ours} {numbers['ours']:8.1f}  {theirs}  ratio {numbers['ratio']:.2f}"
        print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1.1b")
    parser.add_argument("--compare", nargs="+", default=COMPARISONS, metavar="BPW:QUANT")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native.default_num_threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    options = parser.parse_args()
    results = []
    for comparison in options.compare:
        bpw, _, quant = comparison.partition(":")
        results.append(compare(float(bpw), quant, options))
        show(results[-1])
    print(
        json.dumps(
            {
                "threads": options.threads,
                "prompt_tokens": options.prompt,
                "new_tokens": options.new,
                "pairs": options.pairs,
                "kernels": native.cpu_level() if native.native_available() else "reference",
                "comparisons": results,
            }
        )
    )


if __name__ == "__main__":
    main()
