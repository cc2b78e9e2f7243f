"""A sequence gives up its last tokens: pages, text and constraint go back together."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from exl2_rag.llm.constraint import Choice
from exl2_rag.llm.output_text import OutputText
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.tokenizer import Tokenizer
from tests.support.byte_tokenizer import EOS_ID, write_byte_tokenizer
from tests.support.toy_model import VOCAB, expected_tokens, toy_engine


@pytest.mark.parametrize("seed", range(5))
def test_sequences_that_went_astray_and_came_back_say_what_they_would_have_said(seed: int) -> None:
    rng = random.Random(seed)
    engine = toy_engine(n_pages=20, max_seq_len=60, max_batch_size=4)
    scheduler, runner = engine._scheduler, engine._runner
    sequences: dict[Sequence, int] = {}  # and how many tokens of each are the right ones
    for _ in range(8):
        prompt = tuple(rng.choice((1, 2)) for _ in range(rng.randrange(1, 20)))
        sequence = Sequence(prompt, max_new_tokens=20, sampling=SamplingParams())
        sequences[sequence] = 0
        scheduler.add(sequence)
    n_given_up = 0
    while engine.has_work:
        plan = scheduler.plan()
        engine.check_integrity()
        runner.copy_rows(plan.copies)
        rows = runner.run(plan.slices)
        scheduler.complete(plan)
        for one, logits in zip(plan.slices, rows, strict=True):
            if not one.reaches_end:
                continue
            sequence = one.sequence
            right = int(logits[-1].argmax())
            if sequence.n_new == sequences[sequence] and rng.random() < 0.8:
                sequences[sequence] += 1
                sequence.token_ids.append(right)
            else:
                sequence.token_ids.append(rng.randrange(VOCAB))
            if sequence.n_new > sequences[sequence] + rng.randrange(12):
                n_back = sequence.n_new - sequences[sequence] + rng.randrange(min(3, sequences[sequence] + 1))
                n_given_up += n_back
                sequence.roll_back(n_back)
                scheduler.forget_rows(sequence)
                sequences[sequence] = sequence.n_new
                engine.check_integrity()
            if sequences[sequence] >= 20:
                scheduler.remove(sequence)
    assert n_given_up > 50
    for sequence in sequences:
        prompt = sequence.token_ids[: sequence.n_prompt]
        assert sequence.token_ids[sequence.n_prompt :][:20] == expected_tokens(prompt, 20)


def test_text_and_constraint_go_back_together(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    sequence = Sequence(
        (1, 2),
        max_new_tokens=20,
        sampling=SamplingParams(),
        output=OutputText(tokenizer.incremental(after=(1, 2)), ("never",)),
        stop_token_ids=frozenset({EOS_ID}),
        matcher=Choice(["né à", "né où"]).compile(tokenizer),
    )
    assert sequence.output is not None
    assert sequence.matcher is not None

    def add(data: bytes) -> None:
        assert sequence.output is not None
        assert sequence.matcher is not None
        for byte in data:
            sequence.token_ids.append(byte)
            sequence.matcher.advance(byte)
            sequence.output.push(byte)

    add("né à".encode())
    sequence.token_ids.append(EOS_ID)
    sequence.finish_reason = "stop"
    sequence.roll_back(2)  # the end, and half a character
    assert sequence.finish_reason is None
    sequence.roll_back(1)
    add("où".encode()[:3])
    sequence.roll_back(1)
    add("où".encode()[2:])
    sequence.output.finish()
    assert sequence.output.take() == "né où"
    assert sequence.matcher.is_finished
    assert bytes(sequence.token_ids[2:]) == "né où".encode()


@pytest.mark.parametrize("n_tokens", [-1, 2])
def test_more_than_what_was_kept_back_cannot_be_given_up(n_tokens: int) -> None:
    sequence = Sequence((1, 2), max_new_tokens=5, sampling=SamplingParams())
    sequence.token_ids += [3, 4]
    sequence.n_handed_out = 1
    with pytest.raises(ValueError, match="from 0 to 1 tokens"):
        sequence.roll_back(n_tokens)
