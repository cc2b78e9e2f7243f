"""ExLlamaV2's speed on a model of a known shape, for `benchmarks/gpu.py`.

    python benchmarks/peers/exllamav2_speed.py --shape llama-8b --bits 4.0

Writes the synthetic model into the cache once, then measures greedy decoding at batch 1, 8 and 32 and prefill with a
plain loop over `model.forward`, which is the fastest way in. Prints one JSON object. Exits with 1 and says why where
the package or what writes the model is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

BATCHES = (1, 8, 32)
PREFILLS = (512, 2048, 8192)
CONTEXT = 512
NEW_TOKENS = 128


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="ExLlamaV2's speed.")
    parser.add_argument("--shape", required=True)
    parser.add_argument("--bits", type=float, default=4.0)
    options = parser.parse_args(arguments)
    try:
        import torch
        from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config
        from exllamav2 import __version__ as version

        from exl2_rag.llm.quantize.synthetic import ensure_synthetic_model, shape_by_name
    except Exception as error:  # its native part is built at import, and fails in many ways
        print(f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    cache_root = Path(os.environ.get("EXL2_RAG_CACHE") or Path.home() / ".cache" / "exl2-rag")
    model_dir = cache_root / "benchmarks" / f"{options.shape}-{options.bits:g}bpw"
    ensure_synthetic_model(model_dir, shape_by_name(options.shape), bits=options.bits)

    config = ExLlamaV2Config(str(model_dir))
    config.max_seq_len = max(PREFILLS) + NEW_TOKENS
    config.max_batch_size = max(BATCHES)
    model = ExLlamaV2(config)
    model.load()
    result: dict[str, object] = {"version": version, "decode": [], "prefill": []}
    decode: list[dict[str, float]] = []
    prefill: list[dict[str, float]] = []
    with torch.inference_mode():
        for batch in BATCHES:
            cache = ExLlamaV2Cache(model, batch_size=batch, max_seq_len=CONTEXT + NEW_TOKENS + 8)
            ids = torch.randint(3, config.vocab_size, (batch, CONTEXT))
            model.forward(ids, cache, preprocess_only=True)
            token = ids[:, -1:]
            for number in range(NEW_TOKENS):
                if number == 4:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                token = model.forward(token, cache).argmax(dim=-1).cpu()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            decode.append({"batch": batch, "tok_s": batch * (NEW_TOKENS - 4) / seconds})
            del cache
            torch.cuda.empty_cache()
        for length in PREFILLS:
            cache = ExLlamaV2Cache(model, batch_size=1, max_seq_len=length + 8)
            times = []
            for _ in range(3):
                cache.current_seq_len = 0
                ids = torch.randint(3, config.vocab_size, (1, length))
                torch.cuda.synchronize()
                start = time.perf_counter()
                model.forward(ids, cache, preprocess_only=True)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            prefill.append({"tokens": length, "tok_s": length / sorted(times)[1]})
            del cache
    result["decode"], result["prefill"] = decode, prefill
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
