from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2_rag import Choice, ExL2LLM, JsonSchema, SamplingParams
from exl2_rag.errors import BannedStringsError, RequestError
from exl2_rag.llm.banned_strings import BannedStrings, fold
from exl2_rag.llm.output_text import OutputText
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows, Guesses
from tests.llm.speculation.test_speculation import Checked, right
from tests.llm.test_engine import ask, greedy, prompt, run
from tests.llm.test_output_text import Words
from tests.support.synthetic import make_model_dir
from tests.support.toy_model import VOCAB, expected_tokens, toy_engine, toy_logits, toy_text


def expected_without(token_ids: list[int], n_new: int, banned: tuple[str, ...], stop: str = "") -> list[int]:
    """The greedy continuation that goes back to where a banned string began, each token being one character."""
    new: list[int] = []
    bans: dict[int, set[int]] = {}
    while len(new) < n_new:
        logits = toy_logits([*token_ids, *new])
        logits[list(bans.get(len(new), ()))] = -torch_inf
        new.append(int(logits.argmax()))
        text = toy_text(new)
        if stop and stop in text:
            return new
        places = [place for one in banned if (place := text.lower().find(one.lower())) >= 0]
        if places:
            place = min(places)
            bans = {n: tokens for n, tokens in bans.items() if n <= place}
            bans.setdefault(place, set()).add(new[place])
            del new[place:]
    return new


torch_inf = float("inf")


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_text_goes_on_with_another_token_where_a_banned_string_began(seed: int, drafts: bool) -> None:
    rng = random.Random(seed)
    speculator = Speculator(Guesses(right, wrong=0.2, seed=seed), costs=FreeRows()) if drafts else None
    engine = toy_engine(speculator=speculator, n_pages=40, max_seq_len=70)
    cases = []
    for first in range(1, 6):
        plain = toy_text(expected_tokens(prompt(first, 9), 25))
        spans = [(start, start + rng.randrange(1, 5)) for start in rng.sample(range(20), 3)]
        banned = tuple(plain[start:end].swapcase() for start, end in spans)
        banned += tuple(rng.choices("abcdefghij", k=rng.randrange(8)))
        cases.append((prompt(first, 9), banned))
    sequences = [ask(engine, one, greedy(25, banned_strings=banned)) for one, banned in cases]
    outcomes = run(engine, *sequences)
    for (one, banned), outcome in zip(cases, outcomes, strict=True):
        assert outcome.error is None
        assert outcome.token_ids == expected_without(one, 25, banned)
        assert outcome.text == toy_text(outcome.token_ids)
        for n in range(len(outcome.pieces)):  # nor was one ever shown
            shown = "".join(piece.text for piece in outcome.pieces[: n + 1]).lower()
            assert not any(string.lower() in shown for string in banned)
    assert sum(sequence.n_bans for sequence in sequences) > 10


def test_a_banned_string_behind_a_stop_string_is_never_shown_and_changes_nothing() -> None:
    plain = expected_tokens(prompt(3, 9), 20)
    stop = toy_text(plain[8:11])
    for banned in ((toy_text(plain[7:10]),), (toy_text(plain[9:11]),), (toy_text(plain[4:6]),)):
        engine = toy_engine()
        outcome = run(engine, ask(engine, prompt(3, 9), greedy(20, banned_strings=banned, stop=(stop,))))[0]
        expected = toy_text(expected_without(prompt(3, 9), 20, banned, stop))
        assert outcome.text == expected.partition(stop)[0]


def test_a_constraint_goes_back_with_the_text() -> None:
    rng = random.Random(3)
    n_errors = 0
    for _ in range(30):
        options = [[rng.randrange(1, 5), *rng.choices(range(1, 5), k=5)] for _ in range(6)]
        banned = tuple("".join(rng.choices("BCDE", k=2)) for _ in range(5))
        good = [one for one in options if not any(string in toy_text(one) for string in banned)]
        for speculator in (None, Speculator(Guesses(right, wrong=0.2), costs=FreeRows())):
            engine = toy_engine(speculator=speculator)
            how = greedy(6, banned_strings=banned)
            outcome = run(engine, ask(engine, [1, 2], how, Checked(*options)))[0]
            if outcome.error is None:
                assert outcome.token_ids in good
                assert outcome.last.finish_reason == "stop"
            else:
                assert isinstance(outcome.error, BannedStringsError)
                assert "leads to a banned string" in str(outcome.error)
                assert outcome.text == ""
                n_errors += 1
            assert engine.report().running_pages == 0
    assert 0 < n_errors < 30


def test_when_every_token_is_banned_the_request_ends_with_an_error_and_the_others_go_on() -> None:
    engine = toy_engine()
    everything = tuple({toy_text([n]).lower() for n in range(VOCAB)})
    doomed = ask(engine, prompt(1, 5), greedy(5, banned_strings=everything))
    other = ask(engine, prompt(2, 5), greedy(5))
    outcomes = run(engine, doomed, other)
    assert isinstance(outcomes[0].error, BannedStringsError)
    assert outcomes[0].text == ""
    assert outcomes[1].token_ids == expected_tokens(prompt(2, 5), 5)


def test_a_text_that_cannot_get_past_its_bans_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exl2_rag.llm.continuation.MOST_BANS", 20)
    engine = toy_engine()
    everything = tuple({toy_text([n]).lower() for n in range(VOCAB)})
    outcome = run(engine, ask(engine, prompt(1, 5), greedy(5, banned_strings=everything)))[0]
    assert isinstance(outcome.error, BannedStringsError)
    assert "20 times" in str(outcome.error)


def test_seeded_text_without_banned_strings_is_not_changed_by_banning_them() -> None:
    how = SamplingParams(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)
    plain, banning = toy_engine(), toy_engine()
    expected = run(plain, ask(plain, prompt(1, 5), how))[0]
    never = SamplingParams(
        max_tokens=20, temperature=1.0, seed=4, ignore_eos=True, banned_strings=("\x00", expected.text)
    )
    strict = run(banning, ask(banning, prompt(1, 5), never))[0]
    assert strict.token_ids[:1] != expected.token_ids[:1]
    assert expected.text.lower() not in strict.text.lower()


# --- a real tokenizer ------------------------------------------------------------------------------------------------


def test_json_keeps_clear_of_banned_strings(tmp_path: Path) -> None:
    schema = JsonSchema({"type": "array", "items": {"enum": ["Abcabc", "abX", "xyz"]}, "minItems": 3, "maxItems": 4})
    with ExL2LLM(make_model_dir(tmp_path), draft_model="prompt-lookup") as llm:
        for seed in range(3):
            how = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, banned_strings=("BCA",))
            result = llm.generate("text", how, constraint=schema)
            assert schema.matches(result.text, llm.tokenizer)
            assert "bca" not in result.text.lower()
            assert result.finish_reason == "stop"
        with pytest.raises(BannedStringsError, match="relax banned_strings"):
            llm.generate("text", SamplingParams(banned_strings=("CAT",)), constraint=Choice(["a cat", "the cats"]))
        streamed = ""
        for piece in llm.stream(
            "text", SamplingParams(max_tokens=80, temperature=1.0, seed=2, banned_strings=("e", "t"))
        ):
            streamed += piece.text
            assert not {"e", "t"} & set(streamed.lower())


# --- the text alone --------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text("abA", max_size=3), min_size=1, max_size=12),
    banned=st.lists(st.text("abB", min_size=1, max_size=4), min_size=1, max_size=3),
    stop=st.lists(st.text("abA", min_size=1, max_size=3), max_size=2),
)
def test_what_is_handed_out_never_holds_a_banned_string_and_misses_nothing(
    texts: list[str], banned: list[str], stop: list[str]
) -> None:
    output = OutputText(Words(texts), stop, banned)
    shown, kept = "", []
    for n, text in enumerate(texts):
        has_stopped = output.push(n)
        if output.n_banned_tokens:
            n_back = output.n_banned_tokens
            kept.append(text)
            # The banned string begins in the first of the tokens that are taken back.
            whole = "".join(kept).lower()
            start = len("".join(kept[: len(kept) - n_back]))
            places = [place for one in banned if (place := whole.find(one.lower())) >= 0]
            assert start <= min(places) < start + len(kept[-n_back])
            output.roll_back(n_back)
            del kept[len(kept) - n_back :]
        else:
            kept.append(text)
        shown += output.take()
        assert not any(one.lower() in shown.lower() for one in banned)
        if has_stopped:
            break
    output.finish()
    shown += output.take()
    whole = "".join(kept)
    ends = [place for one in stop if (place := whole.find(one)) >= 0]
    assert shown == whole[: min(ends, default=len(whole))]


def test_case_does_not_count_and_places_stay_where_they_are() -> None:
    assert BannedStrings(["STRASSE"]).find("die straße, Die Strasse") == 16
    assert BannedStrings(["İx"]).find("ab İX") == 3
    assert fold("İÉß") == "İéß"
    assert len(fold("ẞİ" * 9)) == 18
    assert BannedStrings(["end"]).begins_at("the EN") == 4
    assert BannedStrings([]).begins_at("the EN") == 6
    assert not BannedStrings()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (("",), "at least one character"),
        (("a\ufffd",), "U\\+FFFD"),
        ("abc", "must be a tuple of strings"),
        ((1,), "strings"),
    ],
)
def test_what_cannot_be_banned_is_refused(value: object, words: str) -> None:
    with pytest.raises(RequestError, match=f"banned_strings.*{words}"):
        SamplingParams(banned_strings=value)  # type: ignore[arg-type]


def test_a_sequence_forgets_the_bans_of_places_it_has_left() -> None:
    sequence = Sequence((1,), max_new_tokens=9, sampling=SamplingParams())
    sequence.token_ids += [2, 3]
    sequence.ban_next(7)
    sequence.roll_back(1)
    sequence.ban_next(8)
    assert sequence.bans == {2: {8}}
