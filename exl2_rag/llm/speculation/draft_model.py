"""Drafts by a smaller model with the same vocabulary, with a KV cache of its own.

The small model runs ahead of each sequence, all sequences in one batch, one step a token. Its tokens are drawn by the
request's own parameters and random numbers, the same that draw the tokens of the large model later: where the two
distributions agree, so do most draws, also at high temperatures.

What it has computed for tokens that turned out wrong is never committed to its pages; the next draft overwrites it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.page_table import HeldPages, PageTable, common_prefix
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sampler import sample
from exl2_rag.llm.sampling.draw import Draw
from exl2_rag.llm.scheduler import Slice
from exl2_rag.llm.sequence import Sequence, State
from exl2_rag.llm.speculation.acceptance import Acceptance

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_DRAFT_TOKENS = 8
FIRST_GUESS = 0.7
"""How likely a token is taken to be right before anything is known, and when it is tried again."""
FIRST_RETRY_TOKENS, LAST_RETRY_TOKENS = 32, 512
"""A sequence that got no draft gets one after so many tokens; that grows while drafts keep failing."""


@dataclass(slots=True, eq=False)
class _Follower:
    """One sequence as the small model sees it.

    Attributes:
        own: its tokens, pages and place in a step.
        ahead: tokens beyond those committed whose keys and values lie on the pages, right or not.
        retry_tokens, n_left_at: tokens between tries, and how many the sequence had at the last draft.
    """

    own: Sequence
    acceptance: Acceptance
    n_left_at: int
    ahead: list[int] = field(default_factory=list)
    retry_tokens: int = FIRST_RETRY_TOKENS

    @property
    def held(self) -> HeldPages:
        """Its pages."""
        assert self.own.held is not None
        return self.own.held


class DraftModel:
    """A proposer for any number of sequences; see `Proposer`.

    Args:
        runner: the small model and its cache.
        config: sizes of its cache and steps; `max_seq_len` is the small model's.
        vocab_size: V of the large model; the small one's may differ by padding.
    """

    def __init__(self, runner: ModelRunner, config: EngineConfig, vocab_size: int) -> None:
        self._runner = runner
        self._config = config
        self._vocab_size = vocab_size
        self._table = PageTable(config.n_pages, config.page_size)
        self._followers: dict[Sequence, _Follower] = {}
        self._shared = Acceptance(1, first_guess=FIRST_GUESS)
        self._step_s: deque[float] = deque(maxlen=16)

    def chances(self, sequences: Seq[Sequence], limits: Seq[int]) -> list[list[float]]:
        """See `Proposer.chances`."""
        self._let_go_of_others(sequences)
        chances = []
        for sequence, limit in zip(sequences, limits, strict=True):
            room = self._config.sequence_limit - len(sequence.token_ids)
            chance = self._chance(sequence)
            chances.append([chance ** (n + 1) for n in range(min(limit, room, MOST_DRAFT_TOKENS))])
        return chances

    def propose(self, sequences: Seq[Sequence], lengths: Seq[int]) -> list[list[int]]:
        """See `Proposer.propose`."""
        drafts: dict[Sequence, list[int]] = {one: [] for one in sequences}
        wanted = {one: length for one, length in zip(sequences, lengths, strict=True) if length}
        logits = self._catch_up(wanted)
        n_advanced = dict.fromkeys(wanted, 0)
        for step in range(max(lengths, default=0)):
            drafting = [one for one in logits if wanted[one] > step]
            if not drafting:
                break
            for one, token_id in zip(drafting, self._draw(drafting, logits, step), strict=True):
                if token_id is None or token_id in one.stop_token_ids:
                    del logits[one]
                    continue
                drafts[one].append(token_id)
                if one.matcher is not None:
                    one.matcher.advance(token_id)
                    n_advanced[one] += 1
            logits = self._step([one for one in drafting if one in logits and wanted[one] > step + 1], drafts)
        for one, n_tokens in n_advanced.items():
            if n_tokens and one.matcher is not None:
                one.matcher.rollback(n_tokens)
        for one in wanted:
            follower = self._followers.get(one)
            if follower is not None:
                del follower.own.token_ids[len(one.token_ids) :]
        return list(drafts.values())

    def seconds(self, length: int) -> float:
        """See `Proposer.seconds`."""
        return length * statistics.median(self._step_s) if self._step_s else 0.0

    def learn(self, sequence: Sequence, n_proposed: int, n_accepted: int) -> None:
        """See `Proposer.learn`."""
        follower = self._followers.get(sequence)
        if follower is None:
            return
        for place in range(min(n_accepted + 1, n_proposed)):
            follower.acceptance.note(0, place < n_accepted)
        worked = n_accepted * 2 >= n_proposed
        follower.retry_tokens = FIRST_RETRY_TOKENS if worked else min(2 * follower.retry_tokens, LAST_RETRY_TOKENS)
        follower.n_left_at = len(sequence.token_ids)

    def _chance(self, sequence: Sequence) -> float:
        follower = self._followers.get(sequence)
        if follower is None:
            return self._shared.chance(0)
        chance = follower.acceptance.chance(0)
        if len(sequence.token_ids) - follower.n_left_at >= follower.retry_tokens:
            return max(chance, FIRST_GUESS)
        return chance

    def _let_go_of_others(self, sequences: Iterable[Sequence]) -> None:
        """Give back the pages of sequences that do not run any more; their tokens stay cached while there is room."""
        for sequence in [one for one in self._followers if one.state is not State.RUNNING]:
            self._table.release(self._followers.pop(sequence).held)

    def _catch_up(self, wanted: dict[Sequence, int]) -> dict[Sequence, Tensor]:
        """Compute what the small model has not seen, as much as may stand beside decoding; return the logits of those
        who are up to date. The others get no draft this time.
        """
        budget = max(self._config.prefill_beside_decode, len(wanted))
        slices: list[Slice] = []
        owners: list[Sequence] = []
        for sequence, length in wanted.items():
            follower = self._follow(sequence)
            own = follower.own
            end = self._table.extend(follower.held, len(own.token_ids) + length - 1)
            n_tokens = min(own.n_pending, budget, end - own.n_computed)
            if n_tokens <= 0 or end < len(own.token_ids) + length - 1:
                continue
            slices.append(Slice(own, own.n_computed, n_tokens))
            owners.append(sequence)
            budget -= n_tokens
        rows = self._run(slices)
        ready = {}
        for sequence, one, logits in zip(owners, slices, rows, strict=True):
            self._table.commit(self._followers[sequence].held, one.sequence.token_ids[one.start :][: one.n_tokens])
            if one.reaches_end:
                ready[sequence] = logits
        return ready

    def _follow(self, sequence: Sequence) -> _Follower:
        """The follower of a sequence, with its tokens; what of its pages agrees with them is kept."""
        tokens = sequence.token_ids
        follower = self._followers.get(sequence)
        if follower is None:
            own = Sequence(tuple(tokens), max_new_tokens=1, sampling=SamplingParams())
            own.held = self._table.hold(tokens, len(tokens) - 1)
            if own.held.copy is not None:
                self._runner.copy_rows([own.held.copy])
            follower = _Follower(own, Acceptance(1, self._shared, FIRST_GUESS), len(tokens))
            self._followers[sequence] = follower
            return follower
        own, held = follower.own, follower.held
        n_kept = min(common_prefix(own.token_ids[: held.n_tokens], tokens), len(tokens) - 1)
        if n_kept < held.n_tokens:
            copy = self._table.truncate(held, n_kept)
            if copy is not None:
                self._runner.copy_rows([copy])
        else:
            # What was computed ahead and came true needs no second time.
            n_true = common_prefix(follower.ahead, tokens[held.n_tokens : len(tokens) - 1])
            self._table.commit(held, follower.ahead[:n_true])
        follower.ahead = []
        own.token_ids[:] = tokens
        return follower

    def _step(self, sequences: Seq[Sequence], drafts: dict[Sequence, list[int]]) -> dict[Sequence, Tensor]:
        """Compute the last token of each draft; return the logits after it."""
        slices = []
        for sequence in sequences:
            follower = self._followers[sequence]
            follower.own.token_ids.append(drafts[sequence][-1])
            follower.ahead.append(drafts[sequence][-1])
            slices.append(Slice(follower.own, len(follower.own.token_ids) - 1, 1))
        started = time.perf_counter()
        rows = self._run(slices)
        if slices:
            self._step_s.append(time.perf_counter() - started)
        return dict(zip(sequences, rows, strict=True))

    def _run(self, slices: Seq[Slice]) -> list[Tensor]:
        return self._runner.run(slices) if slices else []

    def _draw(self, sequences: Seq[Sequence], logits: dict[Sequence, Tensor], step: int) -> list[int | None]:
        """The next token of each draft; None where there is none, or only the large model can say."""
        tokens: list[int | None] = []
        for sequence in sequences:
            row = logits[sequence][-1:, : self._vocab_size]
            try:
                draw = Draw(
                    _plain(sequence.sampling), sequence.seed, sequence.n_new + step, _mask(sequence, row.shape[1])
                )
                tokens.append(sample(row, [draw])[0])
            except Exception:  # whatever is wrong shows when the large model comes to it
                tokens.append(None)
        return tokens


def _plain(params: SamplingParams) -> SamplingParams:
    """What decides most about a draw, without what depends on the tokens before."""
    return SamplingParams(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, seed=params.seed
    )


def _mask(sequence: Sequence, width: int) -> NDArray[np.bool_] | None:
    return None if sequence.matcher is None else sequence.matcher.fill_mask()[:width]
