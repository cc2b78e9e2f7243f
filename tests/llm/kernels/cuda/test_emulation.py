"""The emulation notices what a card would punish, and what it would let pass by luck."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exl2_rag.errors import KernelError
from exl2_rag.llm.kernels.cuda_backend import F32, I32, I64
from tests.cuda_emulation import EmulatedBackend


def run(
    tmp_path: Path, body: str, *, threads: int = 64, blocks: int = 1, order: str = "forward", shared_bytes: int = 0
):
    """Run `body` as a kernel over `float* y` of 64 numbers; returns them."""
    source = f'#include "{Path(__file__).parents[4] / "exl2_rag/llm/kernels/cuda/common.cuh"}"\n'
    source += f'extern "C" __global__ void probe(float* y) {{ {body} }}\n'
    (tmp_path / "probe.cu").write_text(source)
    y = torch.zeros(64)
    backend = EmulatedBackend(80, order=order, source_dir=tmp_path)
    backend.launch("probe", "probe", (blocks, 1, 1), (threads, 1, 1), (y,), shared_bytes=shared_bytes)
    return y


MISTAKES = {
    "divergent barrier": (
        "if (threadIdx.x < 32) {\n __syncthreads();\n } else {\n __syncthreads();\n }",
        "divergent barrier",
    ),
    "barrier that some never reach": (
        "if (threadIdx.x < 5) { __syncwarp(); } else { __syncthreads(); }",
        "waits for ever",
    ),
    "shuffle without a lane": (
        "if (threadIdx.x % 32 != 7) y[threadIdx.x] = __shfl_sync(0xFFFFFFFF, 1.0f, 0);",
        "waits for ever.*warp operation",
    ),
    "mask without the caller": ("y[0] = __shfl_sync(0x1, 1.0f, 0);", "does not hold the calling lane"),
    "write beyond dynamic shared memory": (
        "EXL2_DYNAMIC_SHARED(float, room); room[64 + threadIdx.x] = 1.0f;",
        "beyond its 256 bytes of dynamic shared memory",
    ),
    "index out of a static array": (
        "EXL2_SHARED(float, room, 32); room[threadIdx.x] = 1.0f;",
        "index 32 is out of bounds",
    ),
    "misaligned vector": ("*reinterpret_cast<float4*>(y + 1) = make_float4(0, 0, 0, 0);", "not a multiple of 16"),
    "null pointer": ("float* nothing = nullptr; *nothing = 1.0f;", "is null"),
    "write beyond a static array through a pointer": (
        "EXL2_SHARED(float, room, 32); float* at = room; at[threadIdx.x] = 1.0f;",
        "wrote beyond a static shared array",
    ),
    "index out of an array": (
        "float room[4]; room[threadIdx.x % 8] = 1.0f; y[0] = room[0];",
        "index 4 is out of bounds",
    ),
    "wild pointer": ("reinterpret_cast<float*>(4096)[threadIdx.x] = 1.0f;", "outside of all memory"),
    "misaligned ldmatrix": (
        "EXL2_DYNAMIC_SHARED(float, room); unsigned r[1]; exl2::ldmatrix_x1(r, room + 1);",
        "not 16-byte aligned",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_errors(mistake, tmp_path):
    body, words = MISTAKES[mistake]
    with pytest.raises(KernelError, match=words):
        run(tmp_path, body, shared_bytes=256)


MISSING_BARRIER = (
    "EXL2_SHARED(float, room, 64); room[threadIdx.x] = threadIdx.x; {} y[threadIdx.x] = room[63 - threadIdx.x];"
)


def test_a_missing_barrier_shows_as_nan(tmp_path):
    assert run(tmp_path, MISSING_BARRIER.format("")).isnan().any()
    (tmp_path / "whole").mkdir()
    assert torch.equal(run(tmp_path / "whole", MISSING_BARRIER.format("__syncthreads();")), torch.arange(63.0, -1, -1))


def test_another_order_shows_a_race_that_the_first_hides(tmp_path):
    body = "EXL2_SHARED(float, room, 64); room[threadIdx.x] = threadIdx.x; y[threadIdx.x] = room[threadIdx.x / 2];"
    assert not run(tmp_path, body).isnan().any()
    assert run(tmp_path, body, order="reverse").isnan().any()


ASYNC = """
EXL2_DYNAMIC_SHARED(float, room);
exl2::cp_async_16(room + 4 * threadIdx.x, y + 4 * threadIdx.x);
exl2::cp_async_commit();
{}
y[4 * threadIdx.x] = room[4 * threadIdx.x] + 1.0f;
"""


def test_an_asynchronous_copy_is_there_after_the_wait_and_not_before(tmp_path):
    waited = run(tmp_path, ASYNC.format("exl2::cp_async_wait<0>();"), threads=16, shared_bytes=256)
    assert torch.equal(waited[::4], torch.ones(16))
    (tmp_path / "early").mkdir()
    early = run(tmp_path / "early", ASYNC.format("exl2::cp_async_wait<1>();"), threads=16, shared_bytes=256)
    assert early[::4].isnan().all()


def test_warp_operations_do_what_they_say(tmp_path):
    body = """
    const int lane = threadIdx.x % 32;
    float x = lane;
    y[0] = exl2::warp_sum(x);
    y[1] = exl2::warp_max(x);
    if (lane == 3) {
        y[2] = 1.0f;
    }
    const unsigned votes = __ballot_sync(0xFFFFFFFF, lane % 2);
    const float up = __shfl_up_sync(0xFFFFFFFF, x, 1), down = __shfl_down_sync(0xFFFFFFFF, x, 2, 8);
    if (lane == 10) { y[3] = votes == 0xAAAAAAAAu; y[4] = up; y[5] = down; }
    if (lane == 15) { y[6] = down; }
    """
    assert run(tmp_path, body, threads=32)[:7].tolist() == [496.0, 31.0, 1.0, 1.0, 9.0, 12.0, 15.0]


def test_all_blocks_run_and_poison_returns_with_each(tmp_path):
    body = """
    EXL2_SHARED(float, room, 64);
    y[blockIdx.x] = room[threadIdx.x] != room[threadIdx.x];
    __syncthreads();
    room[threadIdx.x] = 1.0f;
    """
    assert run(tmp_path, body, threads=32, blocks=64).sum() == 64


def test_arguments_must_be_what_the_kernel_takes(tmp_path):
    (tmp_path / "typed.cu").write_text('extern "C" __global__ void typed(float* y, int a, long long b, float c) {}\n')
    backend, y = EmulatedBackend(80, source_dir=tmp_path), torch.zeros(1)
    backend.launch("typed", "typed", (1, 1, 1), (1, 1, 1), (y, I32(1), I64(2), F32(3)))
    for wrong in [(y, I64(1), I64(2), F32(3)), (y, I32(1), I64(2)), (I64(0), I32(1), I64(2), F32(3))]:
        with pytest.raises(KernelError, match="parameters are 'pilf'"):
            backend.launch("typed", "typed", (1, 1, 1), (1, 1, 1), wrong)
    with pytest.raises(KernelError, match="no kernel 'other'"):
        backend.launch("typed", "other", (1, 1, 1), (1, 1, 1), ())


def test_what_no_card_would_launch_is_refused(tmp_path):
    backend = EmulatedBackend(86)
    for grid, block, shared in [
        ((0, 1, 1), (32, 1, 1), 0),
        ((1, 65536, 1), (32, 1, 1), 0),
        ((1, 1, 1), (1025, 1, 1), 0),
    ]:
        with pytest.raises(KernelError, match="cannot be launched"):
            backend.launch("rms_norm", "rms_norm_f32_f32", grid, block, (), shared_bytes=shared)
    with pytest.raises(KernelError, match="bytes of shared memory, at most"):
        backend.launch("rms_norm", "rms_norm_f32_f32", (1, 1, 1), (32, 1, 1), (), shared_bytes=100 << 10)


MMA = """
EXL2_DYNAMIC_SHARED(__half, room);
for (int i = threadIdx.x; i < 16 * 16 + 8 * 16; i += 32) room[i] = __float2half((i * 7 % 23) - 11.0f);
__syncthreads();
const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
unsigned a[4], b[2];
exl2::ldmatrix_x4(a, room + (lane % 16) * 16 + lane / 16 * 8);
exl2::ldmatrix_x2(b, room + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
float c[4] = {0, 0, 0, 0};
exl2::mma_m16n8k16_f16_f32(c, a, b);
float* row = y + 16 * g + 2 * t;
if (g < 4) { row[0] = c[0]; row[1] = c[1]; row[8] = c[2]; row[9] = c[3]; }
"""


def expected_mma() -> torch.Tensor:
    room = torch.tensor([(i * 7 % 23) - 11.0 for i in range(16 * 16 + 8 * 16)])
    product = room[:256].view(16, 16) @ room[256:].view(8, 16).T
    return torch.cat([product[[row, row + 8]] for row in range(4)]).flatten()


def test_fragments_of_tensor_cores_have_the_layout_of_the_hardware(tmp_path):
    assert torch.equal(run(tmp_path, MMA, threads=32, shared_bytes=1024), expected_mma())


@pytest.mark.parametrize("fault", ["EXL2_FAULT_MMA", "EXL2_FAULT_LDMATRIX"])
def test_a_wrong_fragment_layout_gives_wrong_numbers(fault, tmp_path):
    run(tmp_path, MMA, threads=32, shared_bytes=1024)
    backend, y = EmulatedBackend(80, source_dir=tmp_path, defines={fault: 1}), torch.zeros(64)
    backend.launch("probe", "probe", (1, 1, 1), (32, 1, 1), (y,), shared_bytes=1024)
    assert not torch.equal(y, expected_mma())
