"""How good the model is at what it will be asked: the reply it gives under the constraint, scored without decoding.

Every place where the allowed replies part becomes a branch of one row, so one forward pass gives all the logits that a
greedy constrained decoder would look at.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tools.demo_model.batches import bucketed, collate
from tools.demo_model.examples import Codec, Row, ShownPassage
from tools.demo_model.model import Llama
from tools.demo_model.squad import Corpus
from tools.demo_model.vocabulary import random_delimiter


@dataclass(frozen=True, slots=True)
class Case:
    """A question, the passages shown with it, the texts that answer it (none: it has no answer here)."""

    question: str
    shown: tuple[ShownPassage, ...]
    answers: tuple[str, ...]
    best: int = 0  # which passage the baselines look at


@dataclass(frozen=True, slots=True)
class Choice:
    """What the model decided."""

    answerable: float  # log-odds of answering
    label: str
    quote: str


def choose(model: Llama, codec: Codec, cases: Sequence[Case], *, tokens_per_batch: int = 8192) -> list[Choice]:
    """The greedy choice of the constrained model in every case, and its leaning to answer at all."""
    rng = random.Random(0)
    rows, prefixes = [], []
    for case in cases:
        row, found = _row(codec, rng, case)
        rows.append(row)
        prefixes.append(found)
    number = {id(row): n for n, row in enumerate(rows)}
    choices: dict[int, Choice] = {}
    for group in bucketed(rows, tokens_per_batch=tokens_per_batch, rng=rng):
        batch = collate(group, pad=0)
        with torch.inference_mode():
            hidden = model(batch.tokens, batch.positions, batch.mask)
            for row, states in zip(group, hidden, strict=True):
                n = number[id(row)]
                ends = [start + len(b.tokens) - 1 for start, b in zip(row.starts, row.branches, strict=True)]
                logits = model.head(states[ends[1:]])
                choices[n] = _walk(codec, cases[n], prefixes[n], logits)
    return [choices[n] for n in range(len(cases))]


def _row(
    codec: Codec, rng: random.Random, case: Case
) -> tuple[Row, dict[tuple[int, ...], tuple[int, tuple[int, ...]]]]:
    delimiter = random_delimiter(rng)
    row = Row()
    prompt = codec.opening_of_prompt()
    for s in case.shown:
        prompt += codec.document(delimiter, s)
    asked = row.add(row.add(-1, prompt), [*codec.question_turn(delimiter, case.question), *codec.opening])
    found = {(): (0, ())}
    for prefix, options in codec.branching(codec.choices(case.shown)).items():
        if prefix:
            row.add(asked, list(prefix))
        found[prefix] = (len(row.branches) - 2, options)
    return row, found


def _walk(
    codec: Codec, case: Case, found: dict[tuple[int, ...], tuple[int, tuple[int, ...]]], logits: torch.Tensor
) -> Choice:
    at, options = found[()]
    declining, answering = codec.declining[0], codec.before_source[0]
    leaning = float(logits[at, answering] - logits[at, declining])
    allowed = [(s.label, q, codec.choice(s.label, q)) for s in case.shown for q in s.passage.sentences]
    prefix: tuple[int, ...] = (answering,)
    while len({tuple(tokens) for _, _, tokens in allowed}) > 1:
        if prefix in found:
            at, options = found[prefix]
            # A token other than the usual ones still says which way to go: to the replies that begin with it.
            for token in sorted(options, key=lambda option: -float(logits[at, option])):
                going_on = [entry for entry in allowed if codec.may_follow(entry[2][len(prefix) :], token)]
                if going_on:
                    token = going_on[0][2][len(prefix)]  # noqa: PLW2901
                    break
        else:
            token = allowed[0][2][len(prefix)]
        prefix = (*prefix, token)
        allowed = [entry for entry in allowed if tuple(entry[2][: len(prefix)]) == prefix]
    return Choice(leaning, allowed[0][0], allowed[0][1])


def report(corpus: Corpus, cases: Sequence[Case], choices: Iterable[Choice], *, seed: int = 0) -> dict[str, float]:
    """Shares of quotes that hold an answer, the model's and the baselines', and how well it declines."""
    rng = random.Random(seed)
    answerable = unanswerable = 0
    right = random_right = overlap_right = answered_right = kept = declined = 0
    for case, choice in zip(cases, choices, strict=True):
        if not case.answers:
            unanswerable += 1
            declined += choice.answerable < 0
            continue
        answerable += 1
        sentences = case.shown[case.best].passage.sentences
        hit = holds(choice.quote, case.answers)
        right += hit
        answered_right += hit and choice.answerable >= 0
        kept += choice.answerable >= 0
        random_right += holds(rng.choice(sentences), case.answers)
        overlap_right += holds(max(sentences, key=lambda s: corpus.overlap(case.question, s)), case.answers)
    total = max(1, answerable)
    return {
        "cases": float(len(cases)),
        "sentence": right / total,
        "sentence_and_answered": answered_right / total,
        "answered": kept / total,
        "random": random_right / total,
        "overlap": overlap_right / total,
        "declined_unanswerable": declined / max(1, unanswerable),
    }


def holds(text: str, answers: Iterable[str]) -> bool:
    """Whether the text contains one of the answers."""
    lowered = text.lower()
    return any(answer.lower() in lowered for answer in answers)
