"""Where training starts from: weights that can already look words up.

Left to itself a model this small spends hours of a laptop finding out that a question's words lead to the sentence that
holds them. So it starts with that much built in, and learns everything else, and better ways to do this, from there:

    layer 0   each token notes whether the one or two tokens before it end a sentence, and whether it stands in the
              question or the reply
    layer 1   each token of a document fetches the first and the second token of its sentence
    layer 2   each token of the question looks for itself in the documents and fetches the same from where it finds it
    layer 3   the reply collects what the question's rarer words brought, and leans towards those tokens

Spelling makes tokens alike (" Normans", "norman"), and a little of the company they keep in the training text. The
other heads and the MLPs start random. The idea of starting heads from what they are needed for: Trockman and Kolter,
"Mimetic Initialization of Self-Attention Layers".
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders
from torch import Tensor

from tools.demo_model.model import Layer, Llama
from tools.demo_model.vocabulary import BOS

Floats = NDArray[np.float32]

# Which part of the residual stream holds what, of at least 256 numbers.
WORD, FORM = slice(0, 96), slice(96, 128)
CONSTANT, RARITY, IS_END, IS_QUESTION, IS_REPLY, IS_BOS = range(128, 134)
IN_QUESTION, IN_REPLY, AFTER_END, TWO_AFTER_END = range(134, 138)
FIRST, SECOND = slice(140, 188), slice(188, 236)
WIDTH = 256

_LEVEL = 0.3  # of the constant in an embedding, and of the marks written beside it
_ENDS = re.compile(r"[.?!][\"'”’)\]]*|\n+")
_ENDING = re.compile(r"(ing|ed|es|s|ly|ion|al|er|e|y|ies|ied)$")


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """The text of each token and how rare it is, from 0 (everywhere) to 1."""

    texts: list[str]
    rarity: list[float]


def token_facts(tokenizer: Tokenizer, texts: Iterable[Sequence[int]]) -> TokenFacts:
    """Look at every token, and count them in `texts`."""
    decoder = decoders.ByteLevel()
    names = [tokenizer.id_to_token(n) for n in range(tokenizer.get_vocab_size())]
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text)
    most = math.log(max(counts.values()))
    return TokenFacts(
        [name if name.startswith("<|") else decoder.decode([name]) for name in names],
        [1 - math.log(max(counts[n], 1)) / most if counts[n] else 0.0 for n in range(len(names))],
    )


def embeddings(facts: TokenFacts, company: Floats | None, width: int = WIDTH) -> Tensor:
    """[V, width] first embeddings, about 1 long."""
    rows = torch.zeros(len(facts.texts), width)
    for token_id, text in enumerate(facts.texts):
        row = rows[token_id]
        word = _spelling(text)
        if company is not None:
            word = word + 0.3 * company[token_id]
        row[WORD] = 0.8 * torch.from_numpy(word / np.linalg.norm(word))
        row[FORM] = 0.35 * torch.from_numpy(_form(text, token_id))
        row[CONSTANT] = _LEVEL
        row[RARITY] = 0.5 * facts.rarity[token_id] - 0.25
        row[IS_END] = 0.5 * bool(_ENDS.fullmatch(text))
        row[IS_QUESTION] = 0.5 * (text == " question>>\n")
        row[IS_REPLY] = 0.5 * (text == '{"answerable":')
        row[IS_BOS] = 0.5 * (text == BOS)
    return rows


def _spelling(text: str) -> Floats:
    word, width = text.strip().lower(), WORD.stop - WORD.start
    vector = _feature(f"word {word}", width)
    if word.isalpha() and len(word) > 3:
        vector += 1.5 * _feature(f"stem {_ENDING.sub('', word)}", width)
        padded = f"^{word}$"
        grams = [padded[n : n + 3] for n in range(len(padded) - 2)]
        vector += 0.5 * sum(_feature(f"gram {g}", width) for g in grams) / math.sqrt(len(grams))
    return vector / np.linalg.norm(vector)


def _form(text: str, token_id: int) -> Floats:
    width, word = FORM.stop - FORM.start, text.strip()
    kind = "cap" if word[:1].isupper() else "digit" if word.isdigit() else "word" if word.isalpha() else "other"
    vector = _feature("space" if text.startswith(" ") else "no space", width) + _feature(kind, width)
    vector += 0.7 * _feature(f"token {token_id}", width)
    return vector / np.linalg.norm(vector)


def _feature(name: str, width: int) -> Floats:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(width).astype(np.float32) / math.sqrt(width)


def company_vectors(texts: Iterable[Sequence[int]], vocab_size: int, width: int, *, window: int = 4) -> Floats:
    """[V, width] unit vectors from which tokens stand near which (positive mutual information, truncated SVD)."""
    counts = np.zeros((vocab_size, vocab_size), dtype=np.float32)
    ids = np.concatenate([np.array([*text, *[0] * window], dtype=np.int64) for text in texts])
    for distance in range(1, window + 1):
        np.add.at(counts, (ids[:-distance], ids[distance:]), 1 / distance)
    counts += counts.T
    counts[:, 0] = counts[0, :] = 0
    share = counts.sum(axis=0) / counts.sum()
    smoothed = share**0.75 / (share**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(counts / counts.sum() / (share[:, None] * smoothed[None, :]))
    information = np.where(np.isfinite(information), np.maximum(information, 0), 0).astype(np.float32)
    torch.manual_seed(0)
    u, s, _ = torch.svd_lowrank(torch.from_numpy(information), q=width, niter=2)
    vectors = (u * s.sqrt()).numpy()
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6)


def initialise(model: Llama, rows: Tensor, *, built_in: bool = True, seed: int = 0) -> None:
    """Set all weights. `rows` [V, C] are the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(rows)
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.normal_(0, 0.5 / math.sqrt(linear.in_features), generator=generator)
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.normal_(0, 0.02 / math.sqrt(linear.in_features), generator=generator)
        if built_in:
            _Builder(model, generator).build()


class _Builder:
    """Sets heads by hand. `strength` is what a 1 in the residual stream is worth after the norm of a layer."""

    def __init__(self, model: Llama, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator
        shape = model.shape
        self.D, self.C = shape.head_dim, shape.hidden_size
        turns = shape.rope_theta ** (-torch.arange(0, self.D, 2) / self.D)
        self.turns = turns
        self.still = [n for n in range(self.D // 2) if turns[n] < 1 / 400]
        self.strength = math.sqrt(self.C)
        width = WORD.stop - WORD.start
        self.shorten = torch.linalg.qr(torch.randn(width, 48, generator=generator))[0].T * math.sqrt(width / 48)

    def build(self) -> None:
        layers = list(self.model.layers)
        for head, (back, mark) in enumerate(((1, AFTER_END), (2, TWO_AFTER_END))):
            self._look_back(layers[0], head, back, mark)
        self._where_am_i(layers[0], 2)
        for head, (mark, part) in enumerate(((AFTER_END, FIRST), (TWO_AFTER_END, SECOND))):
            self._fetch_start(layers[1], head, mark, part)
        for head, part in enumerate((FIRST, SECOND)):
            self._look_up(layers[2], head, part, seed=7)
            self._collect(layers[3], head, part)
        for number, n_heads in enumerate((3, 2, 2, 2)):
            for head in range(n_heads):
                self._balance(layers[number], head)

    def _head(self, layer: Layer, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of q, k, v (all zero) and the columns of o that belong to a head, to be filled in place."""
        rows = slice(head * self.D, (head + 1) * self.D)
        attention = layer.self_attn
        parts = [p.weight[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        for part in parts:
            part.zero_()
        out = attention.o_proj.weight[:, rows]
        out.zero_()
        return parts[0], parts[1], parts[2], out

    def _balance(self, layer: Layer, head: int) -> None:
        rows = slice(head * self.D, (head + 1) * self.D)
        v, out = layer.self_attn.v_proj.weight[rows], layer.self_attn.o_proj.weight[:, rows]
        factor = (torch.linalg.matrix_norm(out, 2) / torch.linalg.matrix_norm(v, 2)).sqrt()
        v *= factor
        out /= factor

    def _score(self, wanted: float, *levels: float) -> float:
        """The weight on both sides that gives a score of `wanted` from features of these levels."""
        product = math.prod(level * self.strength for level in levels)
        return math.sqrt(wanted * math.sqrt(self.D) / product)

    def _look_back(self, layer: Layer, head: int, back: int, mark: int) -> None:
        q, k, v, out = self._head(layer, head)
        size = self._score(6.0, _LEVEL, _LEVEL)
        for n in range(5):
            angle = back * float(self.turns[n])
            q[n, CONSTANT], q[n + self.D // 2, CONSTANT] = size * math.cos(angle), -size * math.sin(angle)
            k[n, CONSTANT] = size
        v[0, IS_END] = 1 / (0.5 * self.strength)
        out[mark, 0] = 2 * _LEVEL

    def _where_am_i(self, layer: Layer, head: int) -> None:
        q, k, v, out = self._head(layer, head)
        size, n = self._score(18.0, _LEVEL, 0.5), self.still[-1]
        q[n, CONSTANT] = size
        k[n, IS_QUESTION], k[n, IS_REPLY] = size, 1.7 * size
        v[0, IS_QUESTION] = v[1, IS_REPLY] = 1 / (0.5 * self.strength)
        out[IN_QUESTION, 0] = out[IN_REPLY, 1] = _LEVEL

    def _fetch_start(self, layer: Layer, head: int, mark: int, part: slice) -> None:
        q, k, v, out = self._head(layer, head)
        near = [n for n in range(self.D // 2) if 1 / 200 < self.turns[n] < 1 / 25]
        for n, wanted in [*((n, 10.0) for n in near), (self.still[-1], 25.0)]:
            size = self._score(wanted, _LEVEL, 2 * _LEVEL) * 2.2
            q[n, CONSTANT], q[n, IN_QUESTION], q[n, IN_REPLY] = size, -size, -size
            k[n, mark] = size
        v[:48, WORD] = self.shorten / (0.8 * self.strength)
        out[part, :48] = 0.9 * torch.eye(48)

    def _look_up(self, layer: Layer, head: int, part: slice, *, seed: int) -> None:
        q, k, v, out = self._head(layer, head)
        width = WORD.stop - WORD.start
        rows = [row for n in self.still[:-1] for row in (n, n + self.D // 2)]
        generator = torch.Generator().manual_seed(seed)
        view = torch.linalg.qr(torch.randn(width, len(rows), generator=generator))[0].T * math.sqrt(width / len(rows))
        size = self._score(16.0, 0.8, 0.8) * 1.5
        q[rows, WORD] = k[rows, WORD] = size * view
        last, size = self.still[-1], self._score(12.0, _LEVEL, _LEVEL) * 1.5
        q[last, CONSTANT] = size
        k[last, IN_QUESTION] = k[last, IN_REPLY] = -2 * size
        k[last, IS_BOS] = 0.25 * size
        v[:48, part] = torch.eye(48) / self.strength
        out[part, :48] = 1.5 * torch.eye(48)

    def _collect(self, layer: Layer, head: int, part: slice) -> None:
        q, k, v, out = self._head(layer, head)
        n, size = self.still[-1], self._score(12.0, _LEVEL, _LEVEL) * 1.5
        q[n, CONSTANT] = size
        k[n, IN_QUESTION], k[n, IN_REPLY], k[n, RARITY] = size, -size, 0.8 * size
        v[:48, part] = torch.eye(48) / self.strength
        out[WORD, :48] = 3.0 * self.shorten.T
