from __future__ import annotations

import random
from pathlib import Path

from benchmarks.copying_model import write_copying_model
from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.llm.quantize.synthetic import SyntheticShape, write_synthetic_model

SHAPE = SyntheticShape(hidden=512, intermediate=512, layers=3, heads=8, kv_heads=2, vocab=1500, max_position=1024)


def test_the_model_quotes_its_prompt_and_prompt_lookup_spares_most_steps(tmp_path: Path) -> None:
    write_synthetic_model(tmp_path / "random", SHAPE, bits=4.5)
    write_copying_model(tmp_path / "random", tmp_path / "copying", SHAPE)
    rng = random.Random(4)
    passage = [rng.randrange(300, 1500) for _ in range(200)]
    prompt = [256, *passage, *passage[60:66]]
    how = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    with ExL2LLM(tmp_path / "copying", device="cpu", draft_model="prompt-lookup") as llm:
        results = [llm.generate(prompt, how) for _ in range(3)]
        plain = llm.generate(prompt, SamplingParams(max_tokens=80, temperature=0, ignore_eos=True, speculate=False))
    assert list(plain.token_ids) == passage[66:146]
    assert all(one.token_ids == plain.token_ids for one in results)
    assert results[2].speculation is not None
    assert results[2].speculation.accepted_tokens > 30
