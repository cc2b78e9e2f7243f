"""Turns passages and questions into rows of token branches: the prompt once, every question about it a branch.

    root      <|bos|><|system|>...<|end|><|user|> <<9c41e0b7 d17>> Title ... passage
     +- question block, <|end|><|assistant|>, reply
     +- question block, <|end|><|assistant|>, reply

The ids are those the pipeline feeds the engine: each block encoded by itself, the reply in its canonical tokens. Where
the constraint leaves a choice (answer or decline, which source, which sentence) the choices are recorded, so that the
model is trained on the decision it will be asked for. Knows nothing of the model.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from exl2_rag.qa.prompt import SYSTEM_TEXT, document_block, label_order, question_block
from tools.demo_model.squad import Corpus, Passage, closest_rival
from tools.demo_model.vocabulary import ASSISTANT, BOS, END, SYSTEM, USER, random_delimiter

Tokens = list[int]
_LONGEST_LOOKED_AT = 24  # characters of what may follow: longer tokens are fixed pieces, which have no rivals


@dataclass(frozen=True, slots=True)
class Weights:
    """What each kind of token counts in the loss."""

    decision: float = 1.0
    decision_open: float = 0.02  # the same token against the whole vocabulary
    quote: float = 0.01
    text: float = 0.1
    text_open: float = 0.08
    question: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """One token to predict: from which position, over which choices (none: the whole vocabulary)."""

    position: int
    token: int
    weight: float
    choices: tuple[int, ...] = ()
    in_text: bool = False


@dataclass(slots=True)
class Branch:
    """Tokens that follow a parent branch (-1: the start of the row)."""

    parent: int
    tokens: Tokens


@dataclass(slots=True)
class Row:
    """Branches and what to learn from them. Target positions count from the start of the row."""

    branches: list[Branch] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    n_tokens: int = 0
    n_questions: int = 0

    def add(self, parent: int, tokens: Tokens) -> int:
        """Append a branch and say its number."""
        self.branches.append(Branch(parent, tokens))
        self.starts.append(self.n_tokens)
        self.n_tokens += len(tokens)
        return len(self.branches) - 1


@dataclass(frozen=True, slots=True)
class ShownPassage:
    """A passage with the label it has in one prompt."""

    label: str
    passage: Passage


class Codec:
    """Encodes the pieces of prompts and replies."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, Tokens] = {}
        self._id_of = tokenizer.get_vocab()
        self._spelling = {n: spelling for spelling, n in self._id_of.items()}
        # The fixed tokens of a reply, cut out of a whole one.
        self.opening = self.encode('{"answerable":')
        self.declining = [*self.encode("false"), *self.encode(',"claims":[]}')]
        self.before_source = [*self.encode("true"), *self.encode(',"claims":[{"source":"')]
        self.before_quote = self.encode('","quote":"')
        self.before_text = self.encode('","text":"')
        self.closing = self.encode('"}]}')
        self.end = self.special(END)

    def special(self, text: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.token_to_id(text))

    def encode(self, text: str) -> Tokens:
        """The ids of ordinary text."""
        ids = self._cache.get(text)
        if ids is None:
            if len(self._cache) > 200_000:
                self._cache.clear()
            ids = self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def opening_of_prompt(self) -> Tokens:
        """The prompt up to its first document."""
        return [
            self.special(BOS),
            self.special(SYSTEM),
            *self.encode(SYSTEM_TEXT),
            self.end,
            self.special(USER),
        ]

    def question_turn(self, delimiter: str, question: str) -> Tokens:
        """The prompt from the question block on."""
        ids = self.tokenizer.encode(question_block(delimiter, question), add_special_tokens=False).ids
        return [*ids, self.end, self.special(ASSISTANT)]

    def document(self, delimiter: str, shown: ShownPassage) -> Tokens:
        """A document block."""
        text = document_block(delimiter, shown.label, shown.passage.title, shown.passage.text)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def choice(self, label: str, quote: str) -> Tokens:
        """A reply from after its opening to the end of its quote."""
        escaped = json.dumps(quote, ensure_ascii=False)[1:-1]
        return [*self.before_source, *self.encode(label), *self.before_quote, *self.encode(escaped), *self.before_text]

    def text_part(self, text: str) -> Tokens:
        """A reply from its text on."""
        return [*self.encode(json.dumps(text, ensure_ascii=False)[1:-1]), *self.closing, self.end]

    def choices(self, shown: Iterable[ShownPassage], *, may_decline: bool = True) -> list[Tokens]:
        """Every reply the constraint allows, up to the end of the quote."""
        replies = [self.choice(s.label, sentence) for s in shown for sentence in s.passage.sentences]
        return [*replies, self.declining] if may_decline else replies

    def branching(self, replies: Iterable[Sequence[int]]) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Every prefix after which `replies` part, with the tokens that the constraint allows there.

        Those are all tokens that begin one of the texts that may follow, not only the usual ones: where "The" may
        follow, so may "T".
        """
        after: dict[tuple[int, ...], list[Sequence[int]]] = {}
        for reply in replies:
            for n in range(len(reply)):
                after.setdefault(tuple(reply[:n]), []).append(reply[n:])
        return {
            prefix: tuple(sorted({token for rest in rests for token in self._beginnings(rest)}))
            for prefix, rests in after.items()
            if len({rest[0] for rest in rests}) > 1
        }

    def may_follow(self, rest: Sequence[int], token: int) -> bool:
        """Whether `token` begins the text of `rest`."""
        return token in self._beginnings(rest)

    def _beginnings(self, rest: Sequence[int]) -> list[int]:
        spelled = "".join(self._spelling[token] for token in rest[:_LONGEST_LOOKED_AT])[:_LONGEST_LOOKED_AT]
        found = [self._id_of.get(spelled[:n]) for n in range(1, len(spelled) + 1)]
        return [rest[0], *(token for token in found if token is not None)]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about the passages of a row; `label` None: they do not answer it."""

    text: str
    label: str | None
    sentence: int = 0
    answer: str = ""
    whole: bool = True


def show(rng: random.Random, passages: Sequence[Passage]) -> list[ShownPassage]:
    """Give passages random labels and put them in canonical order."""
    numbers = rng.sample(range(1, rng.choice((10, 100, 1000))), len(passages))
    return sorted((ShownPassage(f"d{n}", p) for n, p in zip(numbers, passages, strict=True)), key=_canonical)


def _canonical(shown: ShownPassage) -> tuple[str, int, str]:
    return label_order(shown.label)


def make_row(
    codec: Codec, rng: random.Random, shown: Sequence[ShownPassage], questions: Sequence[Asked], weights: Weights
) -> Row:
    """The row that teaches `questions` about the passages `shown`."""
    delimiter = random_delimiter(rng)
    row = Row()
    prompt = codec.opening_of_prompt()
    for s in shown:
        prompt += codec.document(delimiter, s)
    root = row.add(-1, prompt)
    by_label = {s.label: s.passage for s in shown}
    choices = codec.branching(codec.choices(shown))
    for asked in questions:
        turn = codec.question_turn(delimiter, asked.text)
        if asked.label is None:
            decided, text = codec.declining, [codec.end]
        else:
            decided = codec.choice(asked.label, by_label[asked.label].sentences[asked.sentence])
            text = codec.text_part(asked.answer)
        start = row.n_tokens
        row.n_questions += 1
        if not asked.whole:
            _teach_decisions(row, root, [*turn, *codec.opening], decided, choices, weights)
            continue
        row.add(root, [*turn, *codec.opening, *decided, *text[:-1]])
        header = len(codec.encode(f"<<{delimiter}")) + 1
        row.targets += [
            Target(start + n - 1, turn[n], weights.question) for n in range(header, len(turn) - 2) if weights.question
        ]
        first = start + len(turn) + len(codec.opening)
        row.targets += _reply_targets(decided, choices, first, weights)
        if asked.label is not None:
            quote = by_label[asked.label].sentences[asked.sentence]
            row.targets += _text_targets(codec, quote, text[:-1], first + len(decided), weights)
    return row


def _text_targets(codec: Codec, quote: str, text: Tokens, first: int, weights: Weights) -> list[Target]:
    """Targets of a reply's text: which of the quote's tokens, and that it is one of them at all."""
    escaped = json.dumps(quote, ensure_ascii=False)[1:-1]
    beginnings = {codec.tokenizer.encode(escaped[m.start() : m.start() + 24]).ids[0] for m in _WORDS.finditer(escaped)}
    goings_on = {*codec.encode(escaped), *codec.closing}
    targets = []
    for n, token in enumerate(text):
        options = tuple(sorted((goings_on if n else beginnings) | {token}))
        targets.append(Target(first + n - 1, token, weights.text, options, in_text=True))
        targets.append(Target(first + n - 1, token, weights.text_open))
    return targets


def _teach_decisions(
    row: Row,
    root: int,
    turn: Tokens,
    decided: Tokens,
    choices: dict[tuple[int, ...], tuple[int, ...]],
    weights: Weights,
) -> None:
    """A branch that ends where the last decision is made."""
    at = [n for n in range(len(decided)) if tuple(decided[:n]) in choices]
    start = row.n_tokens + len(turn)
    row.add(root, [*turn, *decided[: at[-1]]])
    row.targets += [Target(start + n - 1, decided[n], weights.decision, choices[tuple(decided[:n])]) for n in at]


def _reply_targets(
    decided: Tokens, choices: dict[tuple[int, ...], tuple[int, ...]], first: int, weights: Weights
) -> list[Target]:
    """Targets of a reply up to the end of its quote; `first` is the position of its first token."""
    targets = []
    for n, token in enumerate(decided):
        options = choices.get(tuple(decided[:n]))
        if options:
            targets.append(Target(first + n - 1, token, weights.decision, options))
            targets.append(Target(first + n - 1, token, weights.decision_open))
        elif weights.quote and n > 3:
            targets.append(Target(first + n - 1, token, weights.quote))
    return targets


_WORDS = re.compile(r"\w[\w'’-]*")
_NAME = re.compile(r"[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)*|\d[\d,.]*\d|\d")
_OPENERS = ("What", "Who", "When", "Where", "Which", "How many", "How", "In what", "Why", "")


def cloze_question(rng: random.Random, passage: Passage, label: str) -> Asked | None:
    """A made-up question: some telling words of a sentence, asking for a name or number of the same sentence."""
    number = rng.randrange(len(passage.sentences))
    sentence = passage.sentences[number]
    names = [match for match in _NAME.finditer(sentence) if match.start() > 0] or list(_WORDS.finditer(sentence))
    if not names:
        return None
    name = rng.choice(names)
    words = [m.group() for m in _WORDS.finditer(sentence) if m.end() <= name.start() or m.start() >= name.end()]
    words = [w for w in words if len(w) > 3 or rng.random() < 0.3]
    if len(words) < 2:
        return None
    kept = rng.sample(range(len(words)), min(len(words), rng.randint(2, 7)))
    if rng.random() < 0.7:
        kept.sort()
    text = " ".join(words[n] if rng.random() < 0.8 else words[n].lower() for n in kept)
    return Asked(f"{rng.choice(_OPENERS)} {text}?".strip(), label, number, name.group())


@dataclass(frozen=True, slots=True)
class Mix:
    """How rows are composed."""

    cloze_share: float = 0.3
    shown_counts: tuple[float, ...] = (0.7, 0.2, 0.1)  # share of rows with 1, 2, 3 passages
    decline_share: float = 0.2
    questions_per_row: int = 12
    longest_prompt_tokens: int = 640
    whole_share: float = 0.3  # of questions whose reply is learnt to its end; the others end with the last decision


class RowSource:
    """An endless stream of training rows."""

    def __init__(
        self, corpus: Corpus, passages: Sequence[int], codec: Codec, *, seed: int, weights: Weights | None = None
    ) -> None:
        self.corpus, self.codec = corpus, codec
        self.passages = [n for n in passages if corpus.passages[n].questions and len(corpus.passages[n].sentences) > 1]
        self.rng = random.Random(seed)
        self.weights = weights or Weights()
        self.mix = Mix()
        self._queue: list[int] = []
        self.n_dropped = 0

    def rows(self, count: int) -> list[Row]:
        """The next `count` rows. Rows whose prompt is too long are dropped and counted."""
        rows: list[Row] = []
        while len(rows) < count:
            row = self._row()
            if len(row.branches[0].tokens) > self.mix.longest_prompt_tokens:
                self.n_dropped += 1
            elif row.n_questions:
                rows.append(row)
        return rows

    def _next_passage(self) -> int:
        if not self._queue:
            self._queue = list(self.passages)
            self.rng.shuffle(self._queue)
        return self._queue.pop()

    def _row(self) -> Row:
        rng, corpus = self.rng, self.corpus
        count = rng.choices((1, 2, 3), self.mix.shown_counts)[0]
        first = self._next_passage()
        numbers = [first]
        while len(numbers) < count:
            article = corpus.by_article[corpus.passages[first].article]
            other = rng.choice(article) if rng.random() < 0.6 else rng.choice(self.passages)
            if other not in numbers:
                numbers.append(other)
        shown = show(rng, [corpus.passages[n] for n in numbers])
        asked = [question for s in shown for question in self._about(s)]
        rng.shuffle(asked)
        asked = asked[: self.mix.questions_per_row]
        asked += self._declined(numbers, len(asked))
        asked = [
            question if rng.random() < self.mix.whole_share else replace(question, whole=False) for question in asked
        ]
        return make_row(self.codec, rng, shown, asked, self.weights)

    def _about(self, shown: ShownPassage) -> list[Asked]:
        rng, passage = self.rng, shown.passage
        real = [Asked(q.text, shown.label, q.sentence, q.answer) for q in passage.questions]
        rng.shuffle(real)
        asked: list[Asked] = []
        for question in real[: self.mix.questions_per_row] or [None] * 2:
            if question is not None:
                asked.append(question)
            if rng.random() < self.mix.cloze_share:
                made_up = cloze_question(rng, passage, shown.label)
                asked += [made_up] if made_up else []
        return asked

    def _declined(self, numbers: Sequence[int], n_answered: int) -> list[Asked]:
        """Questions of other passages: near ones (same article) and far ones."""
        rng, corpus = self.rng, self.corpus
        share = self.mix.decline_share / (1 - self.mix.decline_share)
        wanted = int(n_answered * share + rng.random())
        asked = []
        for _ in range(wanted):
            origin = self._rival(numbers[0]) if rng.random() < 0.7 else rng.choice(self.passages)
            passage = corpus.passages[origin]
            if origin not in numbers and passage.questions:
                asked.append(Asked(rng.choice(passage.questions).text, None))
        return asked

    def _rival(self, number: int) -> int:
        """A passage of the same article that is like this one, so that its questions are hard to tell from ours."""
        passage = self.corpus.passages[number]
        return closest_rival(self.corpus, number, passage.text[:300], self.rng, among=5)
