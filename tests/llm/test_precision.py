"""What the precision "fast" gives beside "exact", on a trained model and on random ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exl2_rag import ExL2LLM, SamplingParams, demo
from exl2_rag.llm.decode_tapes import MOST_KEPT_ROWS, MOST_ROWS, DecodeTapes
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.step_arrays import StepArrays
from tests.support.synthetic import make_model_dir

REPOSITORY = Path(__file__).parents[2]
TEXTS = ("README.md", "docs/architecture.md", "docs/log.md", "examples/document_qa/README.md")
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def log_probabilities(model_dir: Path, texts: list[str], precision: str) -> Tensor:
    with ExL2LLM(model_dir, precision=precision, cache_dtype="fp32") as llm:
        rows = [torch.as_tensor(llm.logits(llm.tokenizer.encode(text)[:700])) for text in texts]
    return torch.log_softmax(torch.cat(rows).double(), dim=-1)


def test_fast_is_exact_within_its_bounds_on_the_demo_model() -> None:
    """Mean KL at most 1e-3 nat, and the same first choice for at least 99.5 % of the tokens."""
    texts = [path.read_text(encoding="utf-8") for path in (REPOSITORY / name for name in TEXTS)]
    exact = log_probabilities(demo.model_dir(), texts, "exact")
    fast = log_probabilities(demo.model_dir(), texts, "fast")
    assert len(exact) > 1500
    assert not torch.equal(exact, fast)
    assert float((exact.exp() * (exact - fast)).sum(-1).mean()) <= 1e-3
    assert float((exact.argmax(-1) == fast.argmax(-1)).double().mean()) >= 0.995


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "exl2"
    return make_model_dir(path, quantised=True, architecture="Qwen2ForCausalLM", intermediate=288)


def test_auto_is_fast_with_native_kernels_alone(model_dir: Path) -> None:
    with ExL2LLM(model_dir) as llm:
        assert llm._engine.config.precision == ("fast" if ops.native_available() else "exact")


@pytest.mark.usefixtures("native_only")
def test_decode_steps_are_recorded_and_give_the_same_text(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(97, 97 + 3 + 2 * n)) for n in range(MOST_ROWS + 2)]
    recorded = {size: [] for size in (1, 2, 5, MOST_ROWS, MOST_ROWS + 2)}
    sizes: list[int] = []
    original = DecodeTapes.run

    def run(self: DecodeTapes, arrays: StepArrays) -> Tensor | None:
        logits = original(self, arrays)
        if logits is not None:
            sizes.append(len(arrays.token_ids))
        return logits

    monkeypatch.setattr(DecodeTapes, "run", run)
    with ExL2LLM(model_dir, precision="fast") as llm:
        for size in recorded:
            recorded[size] = [one.token_ids for one in llm.generate(prompts[:size], GREEDY)]
    assert {1, 2, 5, MOST_ROWS} <= set(sizes)
    assert max(sizes) == MOST_ROWS
    monkeypatch.setattr(DecodeTapes, "run", lambda self, arrays: None)
    with ExL2LLM(model_dir, precision="fast") as llm:
        for size, tokens in recorded.items():
            assert [one.token_ids for one in llm.generate(prompts[:size], GREEDY)] == tokens


@pytest.mark.usefixtures("native_only")
def test_only_the_last_few_batch_sizes_stay_recorded(model_dir: Path) -> None:
    with ExL2LLM(model_dir, precision="fast") as llm:
        tapes = llm._engine._runner._recorded
        assert isinstance(tapes, DecodeTapes)
        for size in range(1, MOST_ROWS + 1):
            llm.generate([[97, 98 + n] for n in range(size)], GREEDY)
        kept = [rows for _, rows in tapes._recorded]
        assert sum(kept) <= MOST_KEPT_ROWS < sum(range(1, MOST_ROWS + 1))
        assert kept[-1] == MOST_ROWS
        assert 1 not in kept


@pytest.fixture
def native_only() -> None:
    if not ops.native_available():
        pytest.skip("steps are recorded with native kernels only")
