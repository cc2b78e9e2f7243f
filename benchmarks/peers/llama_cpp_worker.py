"""The half of `llama_cpp.py` that runs under the peer's own interpreter, which has llama-cpp-python, gguf and numpy.

    python llama_cpp_worker.py write FILE.gguf QUANT SHAPE_JSON
    python llama_cpp_worker.py serve FILE.gguf THREADS PROMPT NEW

`write` makes a model of random weights: each matrix has the type that llama.cpp's quantiser gives it without an
importance matrix (`llama-quant.cpp`), its blocks are random bits under scales that keep variances near 1. `serve` loads
it, prints one JSON line about itself, and then, for each line it reads, which names a setting and a number of new
tokens, measures one prompt and prints a JSON line. Speaks only with the script beside it.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = {
    "repack, flash attention": (True, 1),
    "repack": (True, 0),
    "no repack, flash attention": (False, 1),
    "no repack": (False, 0),
}
"""Whether weights are repacked at load (`use_extra_bufts`, the default), and llama.cpp's number for flash attention,
whose default, -1, takes one of these two."""

BLOCK = {"Q4_0": (32, 18), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q6_K": (256, 210)}
"""Weights and bytes of a block."""

# (byte offset of a float16 scale, its value for weights of variance 1) in each block. The second value follows from
# the format's formula for random bits below the scales.
SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1 / 4.6),),
    "Q2_K": ((80, 1 / 14), (82, 1.5 / 14)),
    "Q3_K": ((108, 1 / 42),),
    "Q4_K": ((0, 1 / 258), (2, 7.5 / 258)),
    "Q6_K": ((208, 1 / 1370),),
}


def use_more_bits(layer: int, layers: int) -> bool:
    """Which layers of a `_M` mix have their sensitive matrices in more bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(quant: str, role: str, layer: int, shape: dict[str, Any]) -> str:
    """The type of a matrix in a Q4_K_M, Q2_K or Q4_0 model of a Llama with up to 64 billion weights."""
    base = {"Q4_K_M": "Q4_K", "Q2_K": "Q2_K", "Q4_0": "Q4_0"}[quant]
    if role == "output":
        return "Q6_K"
    if quant == "Q4_K_M" and role in ("attn_v", "ffn_down"):
        return "Q6_K" if use_more_bits(layer, shape["layers"]) else base
    if quant == "Q2_K" and role == "attn_v":
        return "Q4_K" if shape["heads"] // shape["kv_heads"] >= 4 else "Q3_K"
    if quant == "Q2_K" and role in ("ffn_down", "attn_output"):
        return "Q3_K"
    return base


def matrices(shape: dict[str, Any]) -> Iterator[tuple[str, str, int, int, int]]:
    """(name, role, layer, out features, in features) of every matrix, in the file's order."""
    hidden, inner = shape["hidden"], shape["intermediate"]
    kv_width = hidden // shape["heads"] * shape["kv_heads"]
    yield "token_embd.weight", "token_embd", 0, shape["vocab"], hidden
    yield "output.weight", "output", 0, shape["vocab"], hidden
    for layer in range(shape["layers"]):
        for role, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv_width, hidden),
            ("attn_v", kv_width, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            yield f"blk.{layer}.{role}.weight", role, layer, rows, columns


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int, std: float) -> np.ndarray[Any, Any]:
    """[rows, bytes of a row] uint8."""
    per_block, block_bytes = BLOCK[kind]
    n_blocks = rows * columns // per_block
    words = rng.integers(0, 1 << 64, size=-(-n_blocks * block_bytes // 8), dtype=np.uint64)
    blocks = words.view(np.uint8)[: n_blocks * block_bytes].reshape(n_blocks, block_bytes)
    for offset, value in SCALES[kind]:
        # Signs differ, so that formats whose codes have a mean do not give all outputs a common part.
        sign = np.where(rng.random(n_blocks) < 0.5, -1.0, 1.0) if len(SCALES[kind]) == 1 else np.ones(n_blocks)
        scale = (sign * value * std).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(n_blocks, 2)
    return blocks.reshape(rows, -1)


def write(path: Path, quant: str, shape: dict[str, Any]) -> None:
    """Write a model; it appears under its name when it is complete."""
    import gguf

    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name(f"random {quant}")
    writer.add_context_length(shape["max_position"])
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["intermediate"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab"])
    writer.add_file_type({"Q4_0": 2, "Q2_K": 10, "Q4_K_M": 15}[quant])
    _add_tokenizer(writer, gguf, shape["vocab"])

    norms = [f"blk.{layer}.{name}.weight" for layer in range(shape["layers"]) for name in ("attn_norm", "ffn_norm")]
    norms.append("output_norm.weight")
    kinds = {name: type_of(quant, role, layer, shape) for name, role, layer, _, _ in matrices(shape)}
    for name, _, _, rows, columns in matrices(shape):
        per_block, block_bytes = BLOCK[kinds[name]]
        if columns % per_block:
            raise SystemExit(f"{kinds[name]} needs rows of a multiple of {per_block} weights, {name} has {columns}")
        row_bytes = columns // per_block * block_bytes
        raw = gguf.GGMLQuantizationType[kinds[name]]
        writer.add_tensor_info(name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw)
    for name in norms:
        writer.add_tensor_info(name, (shape["hidden"],), np.dtype(np.float32), 4 * shape["hidden"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(0))
    for name, role, _, rows, columns in matrices(shape):
        std = 1.0 if role == "token_embd" else 1 / math.sqrt(columns)
        writer.write_tensor_data(random_blocks(rng, kinds[name], rows, columns, std))
    for _ in norms:
        writer.write_tensor_data((1 + 0.1 * rng.standard_normal(shape["hidden"])).astype(np.float32))
    writer.close()
    partial.rename(path)


def _add_tokenizer(writer: Any, gguf: Any, vocab: int) -> None:
    """The least that llama.cpp takes: unknown, begin, end, the bytes, and made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    words = [f"x{token_id:x}" for token_id in range(len(tokens), vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + words)
    writer.add_token_scores([-float(n) for n in range(vocab)])
    writer.add_token_types([int(one) for one in [*types, *[kind.NORMAL] * len(words)]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def serve(path: Path, threads: int, n_prompt: int, n_new: int) -> None:
    """Answer each input line, `{"setting": ..., "new": ...}`, with a measurement, until the input ends."""
    # The script beside this one has the package's name and would be found first.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    import llama_cpp as lib

    log: list[str] = []
    keep = _quiet_log(lib, log.append)
    lib.llama_backend_init()
    models = {}
    for repack in (True, False):
        model_params = lib.llama_model_default_params()
        model_params.use_extra_bufts = repack
        models[repack] = lib.llama_model_load_from_file(str(path).encode(), model_params)
        if not models[repack]:
            raise SystemExit(f"llama.cpp cannot load {path}:\n{''.join(log)}")
    contexts = {}
    for name, (repack, flash) in SETTINGS.items():
        params = lib.llama_context_default_params()
        params.n_ctx = n_prompt + n_new + 8
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        params.no_perf = True
        contexts[name] = lib.llama_init_from_model(models[repack], params)
        if not contexts[name]:
            raise SystemExit(f"llama.cpp cannot make a context ({name}):\n{''.join(log)}")
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(models[True]))
    rng = random.Random(0)
    about = {
        "version": lib.__version__,
        "system": lib.llama_print_system_info().decode().strip(" |"),
        "model_bytes": lib.llama_model_size(models[True]),
        "settings": list(SETTINGS),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        result = _measure(lib, contexts[wanted["setting"]], vocab, n_prompt, wanted["new"], rng)
        print(json.dumps(result), flush=True)
    del keep


def _measure(lib: Any, context: Any, vocab: int, n_prompt: int, n_new: int, rng: random.Random) -> dict[str, Any]:
    """Seconds of one prompt and of each new token; random tokens are fed, so nothing is spent on sampling."""
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    tokens = (ctypes.c_int32 * n_prompt)(*rng.choices(range(vocab), k=n_prompt))
    prefill_s = _decode(lib, context, tokens, n_prompt)
    token_s = [
        _decode(lib, context, (ctypes.c_int32 * 1)(token), 1) for token in rng.choices(range(vocab), k=n_new - 1)
    ]
    logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(vocab,))
    if not np.isfinite(logits).all() or logits.std() == 0:
        raise SystemExit("llama.cpp gave logits that are not finite, or all alike")
    return {"prefill_s": prefill_s, "decode_s": sum(token_s), "token_s": token_s, "logit_std": float(logits.std())}


def _decode(lib: Any, context: Any, tokens: Any, count: int) -> float:
    started = time.perf_counter()
    status = lib.llama_decode(context, lib.llama_batch_get_one(tokens, count))
    lib.llama_synchronize(context)
    elapsed = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"llama_decode failed with {status}")
    return elapsed


def _quiet_log(lib: Any, take: Callable[[str], None]) -> Any:
    """Collect llama.cpp's messages instead of printing them; the returned object must live as long as it logs."""
    callback = lib.llama_log_callback(lambda _level, text, _data: take(text.decode(errors="replace")))
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def main() -> None:
    mode, path, *rest = sys.argv[1:]
    if mode == "write":
        quant, shape = rest
        write(Path(path), quant, json.loads(shape))
    elif mode == "serve":
        threads, n_prompt, n_new = map(int, rest)
        serve(Path(path), threads, n_prompt, n_new)
    else:
        raise SystemExit(f"expected write or serve, got {mode}")


if __name__ == "__main__":
    main()
