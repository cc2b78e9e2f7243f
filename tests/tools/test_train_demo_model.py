"""The tool that trains the demo model: what it trains on is what the pipeline will ask, and training works."""

from __future__ import annotations

import json
import lzma
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.llm.chat_template import ChatTemplate, encode_chat
from exl2_rag.llm.constraint import AnswerWithQuotes
from exl2_rag.llm.tokenizer import Tokenizer
from exl2_rag.qa.prompt import DECLINED, SYSTEM_TEXT, answer_json, build_messages
from exl2_rag.qa.settings import QASettings
from tools.demo_model import checking
from tools.demo_model.batches import collate
from tools.demo_model.checking import Case, choose
from tools.demo_model.command import build_tokenizer, prepare_model
from tools.demo_model.examples import Asked, Codec, Mix, RowSource, ShownPassage, Weights, make_row, show
from tools.demo_model.export import write_fp16
from tools.demo_model.model import Llama, Shape
from tools.demo_model.squad import Corpus, read_squad, split_articles
from tools.demo_model.start import initialise
from tools.demo_model.training import Plan, Trainer, orthogonalise
from tools.demo_model.vocabulary import write_tokenizer_files

REPOSITORY = Path(__file__).resolve().parents[2]

PARAGRAPHS = {
    "Norman_conquest": [
        (
            'The Normans came from Denmark in 911. Their leader Rollo swore "fealty" to King Charles. '
            "Later they took England. It was a long war.",
            [("Who swore fealty to King Charles?", "Rollo"), ("Where did the Normans come from?", "Denmark")],
        ),
        (
            "William landed at Pevensey in 1066. He built a castle there. Harold fell at Hastings.",
            [("Where did William land?", "Pevensey"), ("Who fell at Hastings?", "Harold")],
        ),
    ],
    "Water": [
        (
            "Water boils at 100 degrees. Ice melts at 0 degrees. Steam is a gas: it fills any room.",
            [("At how many degrees does water boil?", "100"), ("What fills any room?", "Steam")],
        ),
        (
            "Rivers run to the sea. The Nile is 6,650 km long. Its source was found late.",
            [("How long is the Nile?", "6,650 km"), ("Where do rivers run?", "the sea")],
        ),
    ],
}


@pytest.fixture(scope="module")
def squad_file(tmp_path_factory) -> Path:
    articles = []
    for title, paragraphs in PARAGRAPHS.items():
        rows = []
        for context, questions in paragraphs:
            qas = [
                {"id": q, "question": q, "answers": [{"text": a, "answer_start": context.index(a), "occurrences": 1}]}
                for q, a in questions
            ]
            rows.append({"context": context, "qas": qas})
        articles.append({"title": title, "paragraphs": rows})
    path = tmp_path_factory.mktemp("squad") / "train.json.xz"
    with lzma.open(path, "wt") as file:
        json.dump({"version": "1.1", "data": articles}, file)
    return path


@pytest.fixture(scope="module")
def corpus(squad_file) -> Corpus:
    return read_squad(squad_file)


@pytest.fixture(scope="module")
def codec(corpus) -> Codec:
    return Codec(build_tokenizer(corpus, range(len(corpus.passages)), size=700))


@pytest.fixture(scope="module")
def micro(codec) -> Llama:
    torch.manual_seed(0)
    shape = Shape(
        vocab_size=codec.tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=128,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        head_dim=64,
    )
    model = Llama(shape)
    initialise(model, torch.randn(shape.vocab_size, shape.hidden_size) * 0.1, built_in=False)
    return model


@dataclass(frozen=True)
class Chunk:
    label: str
    title: str
    text: str
    heading: str = ""


def test_a_training_prompt_has_the_ids_that_the_pipeline_feeds_the_engine(corpus, codec, tmp_path) -> None:
    write_tokenizer_files(codec.tokenizer, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    shown = show(random.Random(3), corpus.passages[:2])
    question = "Who swore <|end|> fealty\u2014to King Charles?"

    delimiter = "9c41e0b7"
    ours = codec.opening_of_prompt()
    for s in shown:
        ours += codec.document(delimiter, s)
    ours += codec.question_turn(delimiter, question.replace("<|end|>", "then"))

    chunks = [Chunk(s.label, s.passage.title, s.passage.text) for s in reversed(shown)]
    messages = build_messages(question.replace("<|end|>", "then"), chunks, delimiter)
    theirs = encode_chat(Tokenizer.from_dir(tmp_path), ChatTemplate.from_dir(tmp_path), messages)

    assert ours == theirs


def test_the_pieces_of_a_reply_are_the_tokens_of_the_whole_reply(corpus, codec) -> None:
    for passage in corpus.passages:
        for sentence in passage.sentences:
            pieces = [*codec.opening, *codec.choice("d17", sentence), *codec.text_part("King Charles")]
            whole = codec.tokenizer.encode(answer_json([("d17", sentence, "King Charles")]), add_special_tokens=False)
            assert pieces == [*whole.ids, codec.end]
    declined = codec.tokenizer.encode(DECLINED, add_special_tokens=False)
    assert [*codec.opening, *codec.declining] == declined.ids


def test_a_sentence_has_the_same_tokens_in_a_document_and_in_a_reply_but_for_its_first_space(codec) -> None:
    inside = codec.encode("So it was. Harold fell at Hastings. Then")
    quoted = codec.choice("d1", "Harold fell at Hastings.")

    assert codec.tokenizer.decode(quoted[-5:-1]).endswith("at Hastings.") or len(quoted) > 5
    tail = codec.encode(" at Hastings.")
    joined = " ".join(map(str, inside))
    assert " ".join(map(str, tail)) in joined
    assert quoted[-1 - len(tail) : -1] == tail


def test_the_fixed_pieces_of_a_reply_cost_one_token_each(codec) -> None:
    for piece in ('{"answerable":', "true", "false", ',"claims":[{"source":"', '","quote":"', '","text":"', '"}]}'):
        assert len(codec.encode(piece)) == 1


def test_choices_are_recorded_where_allowed_replies_part_with_every_token_allowed_there(codec) -> None:
    replies = [codec.encode("The sea"), codec.encode("The war"), codec.encode("Water")]
    found = codec.branching(replies)

    the = replies[0][0]
    assert set(found) == {(), (the,)}
    texts = {codec.tokenizer.decode([token]) for token in found[()]}
    assert {"T", "The", "W", "Water"} <= texts
    assert not any(text.startswith(" ") for text in texts)


def test_questions_that_share_a_row_see_only_their_own_branch(corpus, codec, micro) -> None:
    shown = [ShownPassage("d1", corpus.passages[0])]
    asked = [Asked("Who swore fealty?", "d1", 1, "Rollo"), Asked("How long is the Nile?", None)]
    together = make_row(codec, random.Random(0), shown, asked, Weights())
    alone = make_row(codec, random.Random(0), shown, asked[1:], Weights())
    both = collate([together, alone], pad=0)

    with torch.inference_mode():
        hidden = micro(both.tokens, both.positions, both.mask)

    n = len(together.branches[2].tokens)
    assert together.branches[2].tokens == alone.branches[1].tokens
    first, second = together.starts[2], alone.starts[1]
    torch.testing.assert_close(hidden[0, first : first + n], hidden[1, second : second + n], rtol=1e-4, atol=1e-5)


def test_the_loss_falls_within_a_few_steps(corpus, codec, micro, tmp_path) -> None:
    trainer = _trainer(corpus, codec, _copy(micro), tmp_path, max_steps=40)
    trainer.run()

    assert trainer.curve[-1]["loss"] < 0.6 * trainer.curve[0]["loss"]
    assert json.loads((tmp_path / "loss_curve.json").read_text()) == trainer.curve


def test_training_goes_on_from_its_checkpoint(corpus, codec, micro, tmp_path) -> None:
    first = _trainer(corpus, codec, _copy(micro), tmp_path, max_steps=3)
    first.run()
    second = _trainer(corpus, codec, _copy(micro), tmp_path, max_steps=5)

    assert second.resume()
    assert second.progress.step == 3
    second.run()
    assert second.progress.step == 5
    torch.testing.assert_close(
        torch.load(tmp_path / "checkpoint.pt")["model"]["norm.weight"], second.model.norm.weight.detach()
    )


def test_the_exported_model_chooses_under_the_engine_as_in_training(
    corpus, codec, micro, tmp_path, monkeypatch
) -> None:
    model = _copy(micro)
    _trainer(corpus, codec, model, tmp_path / "run", max_steps=60).run()  # long enough to keep to the usual tokens
    write_fp16(model, codec.tokenizer, tmp_path / "fp16", settings={"quote_unit": "sentence", "k": 1, "max_claims": 1})
    shown = tuple(show(random.Random(1), corpus.passages[:1]))
    cases = [Case(q.text, shown, (q.answer,)) for q in corpus.passages[0].questions]
    delimiter = "9c41e0b7"
    monkeypatch.setattr(checking, "random_delimiter", lambda _: delimiter)
    chosen = choose(model, codec, cases)

    with ExL2LLM(tmp_path / "fp16") as llm:
        assert QASettings.for_model(tmp_path / "fp16").quote_unit == "sentence"
        for case, choice in zip(cases, chosen, strict=True):
            chunks = [Chunk(s.label, s.passage.title, s.passage.text) for s in shown]
            constraint = AnswerWithQuotes({s.label: s.passage.sentences for s in shown})
            messages = build_messages(case.question, chunks, delimiter)
            greedy = SamplingParams(temperature=0, max_tokens=400)
            reply = json.loads(llm.chat(messages, greedy, constraint=constraint).text)
            assert reply["answerable"] == (choice.answerable >= 0)
            if reply["answerable"]:
                assert reply["claims"][0]["quote"] == choice.quote


def test_held_out_articles_are_whole_and_never_trained_on(corpus) -> None:
    train, aside = split_articles(corpus, held_out=1, seed=0)

    assert sorted(train + aside) == list(range(len(corpus.passages)))
    assert not {corpus.passages[n].article for n in train} & {corpus.passages[n].article for n in aside}


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 64, 32)))

    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.slow
def test_one_command_trains_with_two_workers_and_writes_both_models(squad_file, tmp_path) -> None:
    command = [sys.executable, REPOSITORY / "tools" / "train_demo_model.py", "--squad", squad_file, "--out", tmp_path]
    plan = json.dumps({"max_steps": 2, "tokens_per_batch": 512, "rows_per_pool": 4})
    options = ["--vocabulary", "700", "--held-out", "1", "--cases", "4", "--plan", plan]

    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr
    with ExL2LLM(tmp_path / "exl2") as llm:
        assert llm.chat([{"role": "user", "content": SYSTEM_TEXT}]).usage.prompt_tokens > 10


def test_the_built_in_start_finds_sentences_by_their_words_before_any_training(corpus, codec) -> None:
    model = prepare_model(codec.tokenizer, corpus, range(len(corpus.passages)))
    wanted = {
        "Harold Hastings fell": (1, "Harold fell at Hastings."),
        "William landed Pevensey": (1, "William landed at Pevensey in 1066."),
        "the Nile long": (3, "The Nile is 6,650 km long."),
        "Ice melts": (2, "Ice melts at 0 degrees."),
        "fills any room": (2, "Steam is a gas: it fills any room."),
        "Rivers sea": (3, "Rivers run to the sea."),
    }
    cases = [Case(question, (ShownPassage("d3", corpus.passages[n]),), ()) for question, (n, _) in wanted.items()]

    found = [choice.quote for choice in choose(model, codec, cases)]

    right = sum(quote == sentence for quote, (_, sentence) in zip(found, wanted.values(), strict=True))
    assert right >= 5, found


def _trainer(corpus: Corpus, codec: Codec, model: Llama, directory: Path, *, max_steps: int) -> Trainer:
    source = RowSource(corpus, range(len(corpus.passages)), codec, seed=0)
    plan = Plan(
        minutes=2, max_steps=max_steps, tokens_per_batch=1024, rows_per_pool=8, print_seconds=0, matrix_rate=5e-3
    )
    mix = Mix(shown_counts=(1.0, 0.0, 0.0), whole_share=0.5)
    return Trainer(model, source, plan, pad=0, directory=directory, schedule=lambda _: mix)


def _copy(model: Llama) -> Llama:
    copy = Llama(model.shape)
    copy.load_state_dict(model.state_dict())
    return copy
