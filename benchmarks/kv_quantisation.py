"""What quantised pages lose: relative error of keys and values by width, with and without rotation and zero point.

    python benchmarks/kv_quantisation.py [--json]

The format is in exl2_rag/llm/kernels/kv_format.py. Beside it stand what it could have been: no rotation, a symmetric
grid whose ends are the largest magnitude, and a zero point for each group, which costs half a bit a number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from exl2_rag.llm.kernels import kv_format

VECTORS, HEAD_DIM = 4096, 128


def data() -> dict[str, Tensor]:
    """Vectors [VECTORS, HEAD_DIM] of several kinds."""
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(VECTORS, HEAD_DIM, generator=rng)
    outliers = torch.randn(VECTORS, HEAD_DIM, generator=rng)
    outliers[:, torch.randperm(HEAD_DIM, generator=rng)[:4]] *= 15
    scales = torch.randn(VECTORS, HEAD_DIM, generator=rng) * torch.randn(HEAD_DIM, generator=rng).exp()
    heavy = torch.randn(VECTORS, HEAD_DIM, generator=rng)
    heavy /= (torch.randn(VECTORS, HEAD_DIM, 3, generator=rng).square().mean(dim=-1)).sqrt()
    return {"normal": normal, "4 channels times 15": outliers, "channels of other scales": scales, "heavy tails": heavy}


def as_stored(x: Tensor, bits: int) -> Tensor:
    codes, scales = kv_format.quantise(x, bits)
    return kv_format.dequantise(codes, scales, bits).float()


def symmetric(x: Tensor, bits: int) -> Tensor:
    groups = x.reshape(len(x), -1, kv_format.QUANT_GROUP)
    ends = (1 << bits) - 1
    scales = (2 * groups.abs().amax(-1, keepdim=True) / ends).half().float()
    codes = (groups / scales + ends / 2).round().clamp(0, ends)
    return ((codes - ends / 2) * scales).reshape(x.shape)


def with_zero_point(x: Tensor, bits: int) -> Tensor:
    groups = x.reshape(len(x), -1, kv_format.QUANT_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales, low = ((high - low) / ((1 << bits) - 1)).half().float(), low.half().float()
    return (((groups - low) / scales).round().clamp(0, (1 << bits) - 1) * scales + low).reshape(x.shape)


def rotated(method: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    return lambda x, bits: kv_format.rotate(method(kv_format.rotate(x), bits))


METHODS = {
    "stored": (rotated(as_stored), 0.5),
    "without rotation": (as_stored, 0.5),
    "symmetric": (rotated(symmetric), 0.5),
    "zero point": (rotated(with_zero_point), 1.0),
}
"""Each method and the bits a number that it takes beside its codes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    as_json = parser.parse_args().json
    results = []
    for name, x in data().items():
        for bits in kv_format.CACHE_BITS:
            errors = {method: float((f(x, bits) - x).norm() / x.norm()) for method, (f, _) in METHODS.items()}
            results.append({"data": name, "bits": bits, "relative_error": errors})
    if as_json:
        print(json.dumps({"vectors": VECTORS, "head_dim": HEAD_DIM, "results": results}))
        return
    print(f"{'data':26}{'bits':>5}" + "".join(f"{f'{name} +{extra}':>22}" for name, (_, extra) in METHODS.items()))
    for row in results:
        print(f"{row['data']:26}{row['bits']:>5}" + "".join(f"{e:>22.4f}" for e in row["relative_error"].values()))


if __name__ == "__main__":
    main()
