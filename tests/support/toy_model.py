"""A model that remembers: its next token is a hash of every token it reads through the pages of its cache.

A page that is missing, stale, another sequence's or out of order changes everything that follows, so a test on its
output sees any mistake in paging. What it should say is computed by `expected_tokens` from the tokens alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.kv_store.tiers import CacheTiers
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.output_text import TokenDecoder
from exl2_rag.llm.request import GenerationRequest
from exl2_rag.llm.speculation.speculator import Speculator

VOCAB = 97
EOS = 0


def toy_logits(token_ids: Sequence[int]) -> Tensor:
    """[V] logits after these tokens."""
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=8).digest()
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)) * 2


def expected_tokens(prompt: Sequence[int], n_new: int, *, context: int = 0) -> list[int]:
    """The greedy continuation, end-of-sequence ignored; `context` is that of the model."""
    tokens = list(prompt)
    for _ in range(n_new):
        tokens.append(int(toy_logits(tokens[-context:]).argmax()))
    return tokens[len(prompt) :]


class ToyModel:
    """Keeps in the cache what it was given, as a real model does: token and position of each row.

    What it says depends on all tokens, or on the last `context` of them; then it soon repeats itself.
    """

    def __init__(self, context: int = 0) -> None:
        self.context = context
        self.n_steps = 0
        self.n_computed = 0  # tokens, over all steps
        self.largest_step = 0
        self.fail_next: Exception | None = None
        self.nan_after: int | None = None  # a sequence whose last token this is gets logits of NaN

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        n_tokens = len(inputs.token_ids)
        self.n_steps += 1
        self.n_computed += n_tokens
        self.largest_step = max(self.largest_step, n_tokens)
        assert len(set(inputs.slot_mapping.tolist())) == n_tokens, "two tokens were to be written to one row"
        tokens, positions = cache.k_pages[0].flatten(0, 1)[:, 0, 0], cache.v_pages[0].flatten(0, 1)[:, 0, 0]
        tokens[inputs.slot_mapping] = inputs.token_ids.float()
        positions[inputs.slot_mapping] = inputs.positions.float()
        rows = range(len(inputs.token_ids)) if inputs.logit_rows is None else inputs.logit_rows.tolist()
        logits = [self._row(inputs, cache, row) for row in rows]
        return torch.stack(logits) if logits else torch.empty(0, VOCAB)

    def _row(self, inputs: ForwardInputs, cache: KVCache, row: int) -> Tensor:
        sequence = int((inputs.query_starts <= row).sum()) - 1
        length = int(inputs.positions[row]) + 1
        assert length <= int(inputs.context_lens[sequence])
        pages = inputs.page_table[sequence, : -(-length // cache.page_size)].long()
        assert (pages >= 0).all()
        read = cache.k_pages[0][pages, :, 0, 0].flatten()[:length]
        positions = cache.v_pages[0][pages, :, 0, 0].flatten()[:length]
        assert positions.tolist() == list(range(length)), "rows out of place"
        if self.nan_after is not None and int(read[-1]) == self.nan_after:
            return torch.full((VOCAB,), torch.nan)
        return toy_logits([int(token) for token in read[-self.context :]])


class ToyDecoder:
    """Token n is the character after "A" by n."""

    def push(self, token_id: int) -> str:
        return chr(ord("A") + token_id)

    def flush(self) -> str:
        return ""

    def state(self) -> object:
        return None

    def restore(self, state: object) -> None:
        pass


class ToyText:
    """Decoders and matchers for the toy vocabulary; a request's constraint makes its own matcher."""

    def decoder(self, prompt: tuple[int, ...]) -> TokenDecoder:
        return ToyDecoder()

    def shown_text(self, token_ids: Sequence[int]) -> str:
        return toy_text(token_ids)

    def matcher(self, request: GenerationRequest):
        return None if request.constraint is None else request.constraint.compile(None, VOCAB)

    def token_text(self, token_id: int) -> str:
        return ToyDecoder().push(token_id)

    def tokens_with(self, text: str) -> frozenset[int]:
        return frozenset(one for one in range(VOCAB) if text in self.token_text(one))

    def special_tokens(self) -> frozenset[int]:
        return frozenset([EOS])

    def healing(self, prompt: tuple[int, ...]):
        raise NotImplementedError("the toy vocabulary has no longer tokens")


def toy_text(token_ids: Sequence[int]) -> str:
    return "".join(ToyDecoder().push(token_id) for token_id in token_ids)


def toy_engine(
    model: ToyModel | None = None,
    *,
    make_tiers: Callable[[KVCache], CacheTiers] | None = None,
    clock: Callable[[], float] = time.monotonic,
    speculator: Speculator | None = None,
    **sizes: int,
) -> Engine:
    """An engine over the toy model; `sizes` are fields of `EngineConfig`."""
    config = EngineConfig(
        **{
            "max_seq_len": 256,
            "n_pages": 64,
            "page_size": 4,
            "max_batch_size": 8,
            "max_batched_tokens": 32,
            "prefill_beside_decode": 16,
            **sizes,
        }
    )
    cache = KVCache(
        n_layers=1,
        n_pages=config.n_pages,
        page_size=config.page_size,
        n_kv_heads=1,
        head_dim=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    runner = ModelRunner(model or ToyModel(), cache, torch.device("cpu"))
    tiers = None if make_tiers is None else make_tiers(cache)
    return Engine(
        runner,
        config,
        ToyText(),
        vocab_size=VOCAB,
        eos_token_ids=[EOS],
        tiers=tiers,
        clock=clock,
        speculator=speculator,
    )
