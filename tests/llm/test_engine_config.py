from __future__ import annotations

import pytest

from exl2_rag.errors import SettingsError
from exl2_rag.llm.engine_config import (
    EngineOptions,
    ModelShape,
    available_memory_bytes,
    resolve,
)

SMALL = ModelShape(max_seq_len=512, cache_elements_per_token=512, fp32_weights=False)
LARGE = ModelShape(max_seq_len=131_072, cache_elements_per_token=16_384, fp32_weights=False)
ODD_HEADS = ModelShape(max_seq_len=512, cache_elements_per_token=512, fp32_weights=False, head_dim=80)
GIB = 2**30


def resolved(shape: ModelShape = SMALL, free_bytes: int = 64 * GIB, **options: object):
    return resolve(EngineOptions(**options), shape, free_bytes=free_bytes)  # type: ignore[arg-type]


def test_defaults_follow_from_the_model() -> None:
    config = resolved()
    assert config.max_seq_len == 512
    assert config.cache_tokens >= 512 * config.max_batch_size
    assert config.device == "cpu"
    assert config.precision == "exact"
    assert resolve(EngineOptions(), SMALL, native=True, free_bytes=GIB).precision == "fast"


def test_the_default_cache_takes_a_share_of_the_free_memory_and_has_a_cap() -> None:
    bytes_per_token = LARGE.cache_elements_per_token * 2
    assert resolved(LARGE, 4 * GIB).cache_tokens * bytes_per_token <= GIB
    assert resolved(LARGE, 4 * GIB).cache_tokens * bytes_per_token > 0.9 * GIB
    assert resolved(LARGE, 1000 * GIB).cache_tokens * bytes_per_token <= 8 * GIB


def test_a_sequence_can_be_no_longer_than_the_cache() -> None:
    assert resolved(LARGE, 4 * GIB).sequence_limit == resolved(LARGE, 4 * GIB).cache_tokens
    assert resolved(cache_tokens=4096).sequence_limit == 512


def test_cache_tokens_are_rounded_up_to_whole_pages() -> None:
    assert resolved(cache_tokens=1000, page_size=64).cache_tokens == 1024


def test_the_batch_is_no_larger_than_the_pages_unless_asked() -> None:
    assert resolved(cache_tokens=128, page_size=16).max_batch_size == 8
    assert resolved(cache_tokens=128, page_size=16, max_batch_size=20).max_batch_size == 20


def test_a_step_has_room_for_every_decoding_sequence_and_some_prefill() -> None:
    config = resolved(max_batch_size=600)
    assert config.max_batched_tokens > 600
    with pytest.raises(SettingsError, match=r"max_batched_tokens must be at least 48 .* got 40"):
        resolved(max_batch_size=32, max_batched_tokens=40)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (ModelShape(512, 100_000, fp32_weights=True), "fp32"),
        (ModelShape(512, 100_000, fp32_weights=False), "fp16"),
        (ModelShape(512, 1024, fp32_weights=False), "fp32"),
    ],
)
def test_the_cache_is_fp32_where_the_weights_are_or_where_it_costs_nothing(shape: ModelShape, expected: str) -> None:
    assert resolved(shape).cache_dtype == expected
    assert resolved(shape, cache_dtype="bf16").cache_dtype == "bf16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device must be 'auto', 'cpu', 'cuda' or such as 'cuda:1', got 'tpu'"),
        ({"device": "cuda:x"}, "device must be .* got 'cuda:x'"),
        ({"precision": "best"}, "precision must be"),
        ({"cache_dtype": "q4", "shape": ODD_HEADS}, "heads of a multiple of 32 .* have 80.*'fp16', 'bf16', 'fp32'"),
        ({"cache_dtype": "int3"}, "cache_dtype must be one of"),
        ({"max_seq_len": 1}, "max_seq_len must be from 2 to the model's 512, got 1"),
        ({"max_seq_len": 513}, "max_seq_len must be from 2 to the model's 512, got 513"),
        ({"cache_tokens": 0}, "cache_tokens must be at least 1, got 0"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"page_size": 48}, "page_size must be 16, 32, 64, 128 or 256, got 48"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(options: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        resolved(**options)


def test_too_little_memory_to_choose_a_cache_is_said() -> None:
    with pytest.raises(SettingsError, match="cache_tokens must be given, since too little memory is free"):
        resolved(LARGE, 1000)


def test_the_free_memory_is_a_sensible_number() -> None:
    assert 2**20 < available_memory_bytes() < 2**50


def test_a_card_is_used_for_what_it_is_good_at() -> None:
    on_card, on_cpu = resolved(LARGE, device="cuda"), resolved(LARGE)
    assert (on_card.device, on_card.precision, on_card.cache_dtype) == ("cuda:0", "fast", "fp16")
    assert resolved(LARGE, device="cuda:1").device == "cuda:1"
    assert on_card.max_batched_tokens > on_cpu.max_batched_tokens
    assert on_card.prefill_beside_decode > on_cpu.prefill_beside_decode
    exact = resolved(LARGE, device="cuda", precision="exact")
    assert (exact.precision, exact.cache_dtype) == ("exact", "fp32")


def test_a_cache_on_a_card_takes_most_of_what_is_free() -> None:
    bytes_per_token = LARGE.cache_elements_per_token * 2
    config = resolved(LARGE, 20 * GIB, device="cuda", max_batch_size=1000)
    assert 15 * GIB < config.cache_tokens * bytes_per_token <= 16 * GIB


def test_a_quantised_cache_holds_more_tokens() -> None:
    tokens = {
        dtype: resolved(LARGE, 20 * GIB, device="cuda", max_batch_size=1000, cache_dtype=dtype).cache_tokens
        for dtype in ("fp16", "q8", "q6", "q4")
    }
    assert tokens["q8"] == pytest.approx(tokens["fp16"] * 16 / 8.5, rel=1e-3)
    assert tokens["q4"] == pytest.approx(tokens["fp16"] * 16 / 4.5, rel=1e-3)
    assert tokens["q8"] < tokens["q6"] < tokens["q4"]


def test_determinism_is_promised_where_it_can_be_kept_and_refused_elsewhere() -> None:
    asked = EngineOptions(deterministic=True)
    assert resolve(asked, SMALL, native=True, free_bytes=GIB).deterministic
    assert resolved(deterministic=True, device="cuda").deterministic
    assert not resolved().deterministic
    with pytest.raises(SettingsError, match="needs the compiled kernels"):
        resolve(asked, SMALL, native=False, free_bytes=GIB)
