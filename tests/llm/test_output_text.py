from __future__ import annotations

import random

import pytest

from exl2_rag.llm.output_text import OutputText


class Words:
    """A decoder whose token n is the n-th of the given texts."""

    def __init__(self, texts: list[str], rest: str = "") -> None:
        self.texts = texts
        self.rest = rest

    def push(self, token_id: int) -> str:
        return self.texts[token_id]

    def flush(self) -> str:
        return self.rest

    def state(self) -> object:
        return None

    def restore(self, state: object) -> None:
        pass


def run(texts: list[str], stop: tuple[str, ...], rest: str = "") -> tuple[list[str], bool]:
    """The pieces handed out after each token, and whether a stop string ended it."""
    output = OutputText(Words(texts, rest), stop)
    pieces = []
    for token_id in range(len(texts)):
        has_stopped = output.push(token_id)
        pieces.append(output.take())
        if has_stopped:
            break
    output.finish()
    pieces.append(output.take())
    return pieces, output.stopped


def test_without_stop_strings_text_is_handed_out_at_once() -> None:
    assert run(["a", "", "bc"], ()) == (["a", "", "bc", ""], False)


def test_nothing_of_a_stop_string_is_handed_out_though_it_spans_tokens() -> None:
    assert run(["one E", "N", "D two"], ("END",)) == (["one ", "", "", ""], True)


def test_what_could_have_become_a_stop_string_is_handed_out_when_it_did_not() -> None:
    assert run(["one E", "N", "ough"], ("END",)) == (["one ", "", "ENough", ""], False)


def test_what_is_held_back_at_the_end_is_text_after_all() -> None:
    assert run(["one EN"], ("END",)) == (["one ", "EN"], False)


def test_an_incomplete_character_at_the_end_is_flushed() -> None:
    assert run(["a"], ("x",), rest="\ufffd") == (["a", "\ufffd"], False)


def test_a_stop_string_may_end_in_the_flushed_rest() -> None:
    assert run(["a E"], ("E\ufffd",), rest="\ufffd") == (["a ", ""], True)


def test_the_stop_string_that_begins_first_counts() -> None:
    assert run(["abcd"], ("cd", "bc")) == (["a", ""], True)


def test_a_stop_string_that_repeats_itself_is_found() -> None:
    assert run(["aab", "aaa", "b!"], ("aaab",)) == (["aab", "", "", ""], True)


@pytest.mark.parametrize("seed", range(20))
def test_any_cutting_into_tokens_gives_the_text_before_the_first_stop_string(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        text = "".join(rng.choices("ab", k=20))
        stop = tuple({"".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(3))})
        cuts = sorted(rng.choices(range(21), k=6))
        texts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, 20], strict=True)]
        pieces, has_stopped = run(texts, stop)
        # The first token after which some stop string is complete decides; then the one that begins first.
        ends = [sum(len(one) for one in texts[: n + 1]) for n in range(len(texts))]
        cut = next((end for end in ends if any(one in text[:end] for one in stop)), None)
        if cut is None:
            assert ("".join(pieces), has_stopped) == (text, False)
        else:
            begin = min(text[:cut].find(one) for one in stop if one in text[:cut])
            assert ("".join(pieces), has_stopped) == (text[:begin], True)
        for n in range(len(pieces)):
            assert not any(one in "".join(pieces[: n + 1]) for one in stop)


def test_a_token_goes_out_with_its_text() -> None:
    output = OutputText(Words(["one", "", " E", "N", "ough", ""]), ("END",))
    counts = []
    for token_id in range(6):
        output.push(token_id)
        output.take()
        counts.append(output.n_tokens_taken)
    assert counts == [1, 1, 3, 3, 5, 5]


def test_tokens_that_were_taken_back_leave_no_trace() -> None:
    output = OutputText(Words(["one", " E", "N", "D", "d"]), ("END",))
    for token_id in (0, 1, 2, 3):
        stopped = output.push(token_id)
    assert stopped
    output.roll_back(2)
    assert not output.stopped
    assert output.take() == "one "
    assert not output.push(4)
    assert output.take() == "Ed"


def test_text_that_was_handed_out_cannot_be_taken_back() -> None:
    output = OutputText(Words(["one", " E", "N"]), ("END",))
    for token_id in (0, 1, 2):
        output.push(token_id)
    assert output.take() == "one "
    output.roll_back(1)
    with pytest.raises(ValueError, match="from 0 to 0 tokens"):
        output.roll_back(1)


@pytest.mark.parametrize("seed", range(10))
def test_taking_back_and_going_on_is_as_never_having_gone_there(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        texts = ["".join(rng.choices("ab", k=rng.randrange(4))) for _ in range(30)]
        stop = ("abba", "bbb")
        output, right = OutputText(Words(texts), stop), []
        handed_out, n_since = "", 0
        while len(right) < 10 and not output.stopped:
            right.append(rng.randrange(30))
            output.push(right[-1])
            n_since += 1
            if rng.random() < 0.3:
                handed_out += output.take()
                n_since = 0
            n_back = rng.randrange(n_since + 1)
            output.roll_back(n_back)
            del right[len(right) - n_back :]
            n_since -= n_back
        output.finish()
        handed_out += output.take()
        straight = OutputText(Words(texts), stop)
        assert not any(straight.push(token_id) for token_id in right[:-1])
        if right:
            assert straight.push(right[-1]) == output.stopped
        straight.finish()
        assert handed_out == straight.take()


def test_a_stop_string_before_the_minimum_is_text_even_after_going_back() -> None:
    output = OutputText(Words(["a", "b"]), stop=("ab",))
    assert not output.push(0, may_stop=False)
    assert not output.push(1, may_stop=False)
    assert not output.push(0)
    output.roll_back(2)
    assert output.push(1)  # completed after the minimum
    output.roll_back(1)
    assert not output.push(1, may_stop=False)
    output.finish()
    assert output.take() == "ab"
