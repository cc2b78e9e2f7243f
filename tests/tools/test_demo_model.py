"""The demo model that comes with the package: small, honest about its prompt form, and able to quote."""

from __future__ import annotations

import json
from dataclasses import dataclass

from exl2_rag import ExL2LLM, demo
from exl2_rag.llm.constraint import AnswerWithQuotes
from exl2_rag.qa.prompt import PROMPT_FORM_VERSION, build_messages
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval.sentences import split_sentences

PASSAGES = {
    "The lighthouse was built in 1862 on the northern rock. Its keeper, Agnes Moore, kept a diary for forty years. "
    "Ships paid a toll of two shillings to the harbour.": (
        ("When was the lighthouse built?", 0),
        ("Who kept a diary for forty years?", 1),
        ("What toll did ships pay to the harbour?", 2),
        ("On which rock was the lighthouse built?", 0),
    ),
    "Bees visit up to a thousand flowers in a day. In winter the colony lives on stored honey. A queen can lay two "
    "thousand eggs daily. Smoke calms the insects, because it hides their alarm signal.": (
        ("How many flowers do bees visit in a day?", 0),
        ("What does the colony live on in winter?", 1),
        ("How many eggs can a queen lay?", 2),
        ("Why does smoke calm the insects?", 3),
    ),
}


@dataclass(frozen=True)
class Chunk:
    label: str
    title: str
    text: str
    heading: str = ""


def test_it_is_small_enough_to_come_with_the_package() -> None:
    assert sum(path.stat().st_size for path in demo.model_dir().iterdir()) <= 20e6


def test_its_card_names_the_prompt_form_that_its_settings_ask_for() -> None:
    directory = demo.model_dir()

    assert QASettings.for_model(directory).quote_unit == "sentence"
    assert f"Prompt form: **{PROMPT_FORM_VERSION}**" in (directory / "README.md").read_text(encoding="utf-8")


def test_it_finds_the_sentence_more_often_than_chance_would() -> None:
    right = 0
    with ExL2LLM(demo.model_dir()) as llm:
        for passage, questions in PASSAGES.items():
            sentences = [passage[start:end] for start, end in split_sentences(passage)]
            constraint = AnswerWithQuotes({"d7": sentences}, max_claims=1, max_text_chars=60)
            for question, number in questions:
                messages = build_messages(question, [Chunk("d7", "Notes", passage)], "9c41e0b7")
                claims = json.loads(llm.chat(messages, constraint=constraint).text)["claims"]
                assert all(claim["quote"] in sentences for claim in claims)
                right += any(claim["quote"] == sentences[number] for claim in claims)

    assert right >= 4, f"{right} of 8; chance gives 2.3"
