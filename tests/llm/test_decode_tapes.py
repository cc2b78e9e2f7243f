"""Short slices of prompts run as recorded steps do, and give what they give otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.llm.decode_tapes import DecodeTapes
from exl2_rag.llm.kernels import tape
from tests.support.synthetic import make_model_dir


@pytest.mark.skipif(not tape.is_available(), reason="steps are recorded with compiled kernels only")
def test_logits_of_short_slices_have_the_same_bits_with_and_without_a_tape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model_dir(tmp_path / "model", quantised=True)
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [[3 + n, 5, 7, 11, 13, 17, 19][: 2 + n] for n in range(5)]
    found = []
    for is_recorded in (True, False):
        if not is_recorded:
            monkeypatch.setattr(DecodeTapes, "run", lambda self, arrays: None)
        with ExL2LLM(model_dir, max_batch_size=4) as llm:
            logits = [llm.logits(one) for one in prompts]
            found.append((logits, [one.token_ids for one in llm.generate(prompts, sampling)]))
    for left, right in zip(found[0][0], found[1][0], strict=True):
        assert left.numpy().tobytes() == right.numpy().tobytes()
    assert found[0][1] == found[1][1]
