"""What a request's sampling remembers and has worked out: one `SamplerState` for each sequence, never shared.

Nothing of it depends on how the tokens came about, so that going back to an earlier token and on from there gives
what a fresh state would give.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from exl2_rag.llm.sampling.params import SamplingParams

Ids = NDArray[np.int64]


class TokenHistory:
    """The tokens of a sequence as an array that grows with it."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._buffer = np.array(token_ids, dtype=np.int64)
        self._length = len(token_ids)

    def __len__(self) -> int:
        return self._length

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take on the tokens that `token_ids` has beyond those known, which it must begin with."""
        new = token_ids[self._length :]
        end = self._length + len(new)
        if end > len(self._buffer):
            larger = np.empty(max(64, 2 * end), dtype=np.int64)
            larger[: self._length] = self._buffer[: self._length]
            self._buffer = larger
        self._buffer[self._length : end] = new
        self._length = end

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`. Harmless when there are no more."""
        self._length = min(self._length, n_tokens)

    def last(self, n_tokens: int | None = None) -> Ids:
        """[n] the last `n_tokens`, or all; valid until the next change."""
        start = 0 if n_tokens is None else max(0, self._length - n_tokens)
        return self._buffer[start : self._length]


class SamplerState:
    """What one sequence's sampling needs beside its parameters.

    Args:
        params: of the request; kept, not changed.
        prompt: its token ids.
        end_ids: ids that end the text; `min_tokens` keeps them off.
        breakers: ids that DRY's repetitions do not reach over.
        xtc_ignored: ids that XTC never drops.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        *,
        end_ids: Collection[int] = (),
        breakers: Collection[int] = (),
        xtc_ignored: Collection[int] = (),
    ) -> None:
        self.params = params
        self.n_prompt = len(prompt)
        self.history = TokenHistory(prompt)
        self.end_ids = _ids(sorted(end_ids))
        self.breakers = _ids(sorted(breakers))
        self.xtc_ignored = _ids(sorted(xtc_ignored))
        self.bias_ids = _ids(params.logit_bias)
        self.bias = np.array(list(params.logit_bias.values()), dtype=np.float64)
        self.banned_ids = _ids(params.banned_tokens)
        self.allowed_ids = None if params.allowed_tokens is None else _ids(params.allowed_tokens)
        self._mus = [(0, 2 * params.mirostat_tau)]

    def fork(self) -> SamplerState:
        """A state with the same past whose future is its own."""
        twin = SamplerState.__new__(SamplerState)
        twin.__dict__.update(self.__dict__)
        twin.history = TokenHistory()
        twin.history.follow(list(self.history.last()))
        twin._mus = list(self._mus)
        return twin

    def truncate(self, n_tokens: int) -> None:
        """Go back to the first `n_tokens` of prompt and text. To be called before other tokens take their place."""
        self.history.truncate(n_tokens)

    def may_draw(self, token_id: int, n_new: int) -> bool:
        """Whether bans, allowed tokens and `min_tokens` let this id come after `n_new` new tokens."""
        if n_new < self.params.min_tokens and token_id in self.end_ids:
            return False
        if self.allowed_ids is not None and token_id not in self.allowed_ids:
            return False
        return token_id not in self.banned_ids

    def mu(self, step: int) -> float:
        """Mirostat's bound on the surprise, in bits, of the token that comes after `step` new ones."""
        return next(value for since, value in reversed(self._mus) if since <= step)

    def learn_mu(self, step: int, surprise: float) -> None:
        """Note the surprise, in bits, of the token drawn after `step` new ones."""
        mu = self.mu(step) - self.params.mirostat_eta * (surprise - self.params.mirostat_tau)
        while self._mus[-1][0] > step:
            self._mus.pop()
        self._mus.append((step + 1, mu))


def _ids(values: Collection[int]) -> Ids:
    return np.array(list(values), dtype=np.int64)
