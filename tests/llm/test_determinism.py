"""Cold, warm, batched, preempted and sliced runs give the same logits, bit for bit.

Every row of logits that any step of the engine computes is written down with the text it stands after, and compared
with the row that one cold prefill of that text gives in a fresh engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exl2_rag import ExL2LLM, SamplingParams, demo
from exl2_rag.llm.kernels import native, ops
from exl2_rag.llm.model_runner import ModelRunner, wanted_rows
from tests.llm.models.test_quantised import _to_gptq
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PAGE_SIZE = 16


@dataclass(frozen=True)
class Kind:
    """A model and the options that change what is computed."""

    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)


def _gptq(path: Path) -> Path:
    make_model_dir(path, dtype=torch.float16, intermediate=288)
    _to_gptq(path, act_order=True, checkpoint_format="gptq")
    return path


KINDS = {
    "float32, wide": Kind(lambda path: make_model_dir(path, hidden=320, heads=4, kv_heads=1, intermediate=352)),
    "bfloat16": Kind(lambda path: make_model_dir(path, dtype=torch.bfloat16), {"cache_dtype": "bf16"}),
    "float16, window": Kind(
        lambda path: make_model_dir(
            path, dtype=torch.float16, architecture="MistralForCausalLM", sliding_window=50, head_dim=80
        ),
        {"cache_dtype": "fp16"},
    ),
    "exl2, fast": Kind(lambda path: make_model_dir(path, quantised=True), {"precision": "fast", "cache_dtype": "fp16"}),
    "exl2, exact": Kind(
        lambda path: make_model_dir(path, quantised=True, architecture="Qwen2ForCausalLM"), {"precision": "exact"}
    ),
    "gptq, fast": Kind(_gptq, {"precision": "fast", "cache_dtype": "fp16"}),
    "gptq, exact": Kind(_gptq, {"precision": "exact"}),
    "exl2, 8-bit cache": Kind(lambda path: make_model_dir(path, quantised=True, seed=3), {"cache_dtype": "q8"}),
    "float16, 4-bit cache": Kind(lambda path: make_model_dir(path, dtype=torch.float16), {"cache_dtype": "q4"}),
    "demo": Kind(lambda _path: demo.model_dir()),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model_dir(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind.make(tmp_path_factory.mktemp("models") / "model")


class Recorder:
    """Rows of logits by the text they stand after."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], list[Tensor]] = {}

    def note(self, token_ids: tuple[int, ...], row: Tensor) -> None:
        self.rows.setdefault(token_ids, []).append(row.clone())


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Note every row of logits that any engine computes meanwhile."""
    recorder, original = Recorder(), ModelRunner.run

    def run(self: ModelRunner, slices: Any) -> list[Tensor]:
        found = original(self, slices)
        for one, rows in zip(slices, found, strict=True):
            for offset, row in zip(wanted_rows(one), rows, strict=True):
                recorder.note(tuple(one.sequence.token_ids[: one.start + offset + 1]), row)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "run", run)
        yield recorder


def words(n_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97, 123) for _ in range(n_tokens)]


def engine(model_dir: Path, kind: Kind, **options: Any) -> ExL2LLM:
    return ExL2LLM(model_dir, **{"page_size": PAGE_SIZE, "max_seq_len": 400, **kind.options, **options})


def check(recorder: Recorder, cold: ExL2LLM, *, at_least: int) -> None:
    """Compare all rows with those of one prefill of the longest texts they belong to."""
    texts = sorted(recorder.rows, key=len, reverse=True)
    known: dict[tuple[int, ...], Tensor] = {}
    for text in texts:
        if text in known:
            continue
        with recorded() as fresh:  # `logits` computes every token anew, whatever is cached
            rows = cold.logits(text)
        assert len(fresh.rows) == len(text)
        known |= {text[: place + 1]: row for place, row in enumerate(rows)}
    n_rows = sum(len(rows) for rows in recorder.rows.values())
    assert n_rows >= at_least
    different = [len(text) for text in texts for row in recorder.rows[text] if not torch.equal(row, known[text])]
    assert not different, (
        f"{len(different)} of {n_rows} rows differ, after texts of {sorted(set(different))[:10]} tokens"
    )


@pytest.fixture(scope="module")
def cold(model_dir: Path, kind: Kind) -> Iterator[ExL2LLM]:
    with engine(model_dir, kind, cache_tokens=512, max_batched_tokens=512) as llm:
        yield llm


def test_slices_change_no_bit(model_dir: Path, kind: Kind, cold: ExL2LLM) -> None:
    prompts = [words(length, seed=length) for length in (1, 2, 17, 64, 131, 257)]
    with (
        recorded() as recorder,
        engine(model_dir, kind, cache_tokens=800, max_batch_size=1, max_batched_tokens=19) as llm,
    ):
        for prompt in prompts:
            llm.generate(prompt, GREEDY)
        llm.logits(words(150, seed=3))
    check(recorder, cold, at_least=len(prompts) * 12 + 150)


def test_a_warm_cache_changes_no_bit(model_dir: Path, kind: Kind, cold: ExL2LLM) -> None:
    shared = words(200, seed=1)
    with recorded() as recorder, engine(model_dir, kind, cache_tokens=1600) as llm:
        llm.generate([*shared, *words(20, seed=2)], GREEDY)
        for length in (1, 15, 16, 17, 100, 200):
            result = llm.generate([*shared[:length], 1, *words(9, seed=length)], GREEDY)
            assert result.usage.cached_tokens == length
        again = llm.generate(shared, GREEDY)
        assert again.usage.cached_tokens == len(shared) - 1
    check(recorder, cold, at_least=8 * 12)


def test_a_batch_of_any_size_and_of_shared_prefixes_changes_no_bit(model_dir: Path, kind: Kind, cold: ExL2LLM) -> None:
    shared = words(290, seed=7)
    prompts = [[*shared, n, n + 1] for n in range(6)]
    prompts += [words(length, seed=length) for length in (1, 5, 16, 31, 33, 90, 150)]
    with recorded() as recorder, engine(model_dir, kind, cache_tokens=4096, max_batch_size=16) as llm:
        for size in (3, len(prompts)):
            llm.generate(prompts[-size:], GREEDY)
        llm.generate(prompts, GREEDY)
    check(recorder, cold, at_least=len(prompts) * 12)


def test_preemption_changes_no_bit(model_dir: Path, kind: Kind, cold: ExL2LLM) -> None:
    prompts = [words(20 + 3 * n, seed=n) for n in range(5)]
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with recorded() as recorder, engine(model_dir, kind, cache_tokens=112, max_batch_size=6) as llm:
        llm.generate(prompts, sampling)
        assert llm.cache_report().preemptions > 0
    check(recorder, cold, at_least=5 * 24)


def test_the_number_of_threads_changes_no_bit(model_dir: Path, kind: Kind) -> None:
    text = words(120, seed=9)
    with engine(model_dir, kind, cache_tokens=256) as llm:
        before = llm.logits(text)
    try:
        with engine(model_dir, kind, cache_tokens=256, num_threads=1) as llm:
            assert torch.equal(llm.logits(text), before)
    finally:  # it holds for the whole process
        ops.set_num_threads(native.default_num_threads())
