"""A model's reply is read strictly: right, or refused, or marked as cut off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2_rag.errors import AnswerError
from exl2_rag.qa.answer import RawClaim, parse_reply
from exl2_rag.qa.prompt import DECLINED, answer_json


def test_an_answer_is_read_as_it_was_written() -> None:
    claims = [("d1", 'He said "no" \\ left.\n', "No."), ("d22", "ünï — 日本", "Yes")]
    reply = parse_reply(answer_json(claims))
    assert reply.answerable
    assert not reply.truncated
    assert [(claim.source, claim.quote, claim.text) for claim in reply.claims] == claims


def test_declining_is_read_as_declining() -> None:
    reply = parse_reply(DECLINED)
    assert not reply.answerable
    assert reply.claims == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not parse"),
        ("The answer is 42.", "does not parse"),
        ('{"answerable":true,"claims":[{"source":"d1","quote":"a', "does not parse"),
        (DECLINED + " And besides:", "does not parse"),
        ("[" * 100_000, "does not parse"),
        ("[]", "expected an object"),
        ('{"answerable":true}', "expected an object"),
        ('{"answerable":false,"claims":[],"mood":"good"}', "expected an object"),
        ('{"answerable":"false","claims":[]}', "true or false"),
        ('{"answerable":true,"claims":{}}', "as a list"),
        ('{"answerable":true,"claims":[]}', "contradicts itself"),
        ('{"answerable":false,"claims":[{"source":"d1","quote":"a","text":"b"}]}', "contradicts itself"),
        ('{"answerable":true,"claims":["d1"]}', "expected each claim"),
        ('{"answerable":true,"claims":[{"source":"d1","quote":"a"}]}', "expected each claim"),
        ('{"answerable":true,"claims":[{"source":1,"quote":"a","text":"b"}]}', "expected each claim"),
        ('{"answerable":true,"claims":[{"source":"d1","quote":"a","text":"b","page":3}]}', "expected each claim"),
        ('{"answerable":true,"answerable":false,"claims":[]}', "each key once"),
    ],
)
def test_any_other_reply_is_an_error_that_says_why(text: str, complaint: str) -> None:
    with pytest.raises(AnswerError, match=complaint):
        parse_reply(text)


@given(st.text(max_size=40), st.data())
def test_a_reply_cut_off_anywhere_gives_its_whole_claims_and_says_so(words: str, data: st.DataObject) -> None:
    claims = [("d1", words, "one"), ("d2", words + "x", "two"), ("d3", "end", words)]
    whole = answer_json(claims)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    reply = parse_reply(cut, cut_off=True)
    assert reply.truncated
    given = [(claim.source, claim.quote, claim.text) for claim in reply.claims]
    assert given == claims[: len(given)]
    complete = sum(len(answer_json(claims[:n])) - len("]}") <= len(cut) for n in (1, 2, 3))
    assert len(given) == complete


def test_a_reply_that_ends_whole_at_the_limit_is_not_marked() -> None:
    assert not parse_reply(DECLINED, cut_off=True).truncated


def test_a_cut_off_reply_in_another_form_gives_no_claims() -> None:
    reply = parse_reply('{"claims": [{"source": "d1", "quote": "a", "text": "b"}, {"sour', cut_off=True)
    assert reply.truncated
    assert reply.claims == ()


def test_a_cut_off_reply_with_a_wrong_claim_is_still_an_error() -> None:
    with pytest.raises(AnswerError, match="expected each claim"):
        parse_reply('{"answerable":true,"claims":[{"source":"d1"},{"so', cut_off=True)


def test_claims_are_plain_values() -> None:
    assert RawClaim("d1", "a", "b") == RawClaim("d1", "a", "b")
