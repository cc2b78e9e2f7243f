"""What the tests of attention, of quantised pages and of sampling compare shows faults: each is planted and noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from exl2_rag.errors import KernelError
from exl2_rag.llm.kernels import cuda_attention, cuda_sampling, reference_attention, reference_sampling
from exl2_rag.llm.kernels.cuda_backend import SOURCE_DIR
from tests.cuda_emulation import EmulatedBackend
from tests.llm.kernels.cuda.test_attention import assert_near, attend, expected, make_case
from tests.llm.kernels.cuda.test_sampling import params
from tests.llm.kernels.samples import write_arguments

END_OF_VALUES = "is_inside && span_key + 16 * j + key < n_keys) {\n                    stored.load(from.v"
STAGE = "__syncthreads();\n            room[i] = x;\n            __syncthreads();"

ATTENTION_FAULTS = {
    "a key too many": ("attention_batch.cuh", "result.row + 1;", "result.row + 2;"),
    "values beyond the end": (
        "paged_attention.cuh",
        END_OF_VALUES,
        "is_inside) {\n                    stored.load(from.v",
    ),
    "spans read without a barrier": ("paged_attention.cuh", "__syncthreads();\n            write_spans", "write_spans"),
    "a split left out": ("attention_combine.cu", "split <= last_split)", "split < last_split)"),
}
"""File, and what stands there with what it becomes."""

WRITE_FAULTS = {
    "a stage of the rotation without a barrier": ("hadamard.cuh", STAGE, "room[i] = x;"),
    "codes rounded down": ("kv_quantise.cu", "rintf(", "floorf("),
    "codes in another order": ("kv_quantise.cu", "16 * (e % 2)", "4 * (e % 2)"),
}

SAMPLING_FAULTS = {
    "the highest id of equals": ("sampling.cu", "key > own_maximum)", "key >= own_maximum)"),
    "one token less in top-p": ("sampling.cu", "before[e] < wanted", "before[e] + masses[e] < wanted"),
    "another uniform number": ("sampling.cu", "0x9E3779B97F4A7C15ull", "0x9E3779B97F4A7C14ull"),
}


def faulty(directory: Path, name: str, sound: str, broken: str) -> EmulatedBackend:
    """A backend of kernels with one change."""
    shutil.copytree(SOURCE_DIR, directory / "cuda")
    path = directory / "cuda" / name
    text = path.read_text(encoding="utf-8")
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, broken), encoding="utf-8")
    return EmulatedBackend(80, order="shuffled", source_dir=directory / "cuda")


def is_attention_noticed(backend: EmulatedBackend) -> bool:
    case = make_case("f16", [(1, 300), (20, 310), (2, 90)], exact=False, heads=4, head_dim=64)
    try:
        assert_near(attend(backend, case), expected(case), "f16")
    except (AssertionError, KernelError):
        return True
    return False


def is_write_noticed(backend: EmulatedBackend) -> bool:
    *inputs, k_pages, v_pages = write_arguments(5, bits=4, head_dim=128, rotary=64)
    *_, wanted_k, wanted_v = write_arguments(5, bits=4, head_dim=128, rotary=64)
    wanted = reference_attention.quantise_kv_write(*inputs, wanted_k, wanted_v)
    actual = cuda_attention.quantise_kv_write(backend, *inputs, k_pages, v_pages)
    pairs = ((actual, wanted), (k_pages.codes, wanted_k.codes), (v_pages.codes, wanted_v.codes))
    return not all(torch.equal(mine, theirs) for mine, theirs in pairs)


def is_sampling_noticed(backend: EmulatedBackend) -> bool:
    logits = (torch.arange(3000) * 7 % 4).float().repeat(4, 1)  # threads have equals among their own
    rows = params([(0.0, 0, 1.0, 0.0), (0.5, 0, 1e-4, 0.0), (0.5, 0, 2e-3, 0.0), (1.0, 0, 1.0, 0.0)])
    tokens, _ = cuda_sampling.sample(backend, logits, None, rows)
    return not torch.equal(tokens, reference_sampling.sample(logits, None, rows)[0])


def test_sound_kernels_pass_what_shows_faults():
    backend = EmulatedBackend(80, order="shuffled")
    assert not is_attention_noticed(backend)
    assert not is_write_noticed(backend)
    assert not is_sampling_noticed(backend)


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_a_fault_of_attention_is_noticed(tmp_path, fault):
    assert is_attention_noticed(faulty(tmp_path, *ATTENTION_FAULTS[fault]))


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_fault_in_writing_quantised_pages_is_noticed(tmp_path, fault):
    assert is_write_noticed(faulty(tmp_path, *WRITE_FAULTS[fault]))


@pytest.mark.parametrize("fault", SAMPLING_FAULTS)
def test_a_fault_of_sampling_is_noticed(tmp_path, fault):
    assert is_sampling_noticed(faulty(tmp_path, *SAMPLING_FAULTS[fault]))
