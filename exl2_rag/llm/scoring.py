"""What a model thinks of given tokens: logits, scores, log-probabilities. Nothing is sampled here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from exl2_rag.errors import RequestError
from exl2_rag.llm.prompts import Prompt, as_token_ids
from exl2_rag.llm.sequence import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from exl2_rag.llm.engine import Engine
    from exl2_rag.llm.engine_thread import EngineThread
    from exl2_rag.llm.logprobs import TokenLogprob
    from exl2_rag.llm.lora.choice import Lora
    from exl2_rag.llm.prompt_logprobs import PromptLogprobs
    from exl2_rag.llm.tokenizer import Tokenizer


class Scoring:
    """The part of `ExL2LLM` that reads logits.

    Whatever is asked of a token is computed anew; only what stands before the first token asked for may come from the
    cache, and that changes nothing: reuse is exact to the bit.
    """

    tokenizer: Tokenizer
    _engine: Engine
    _thread: EngineThread

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos))
        return as_token_ids(prompt)

    def each_logits(
        self,
        token_ids: Seq[int],
        receive: Callable[[int, Tensor], None],
        *,
        first_row: int = 0,
        lora: Lora | None = None,
    ) -> None:
        """Compute tokens and hand on the logits after them, some rows at a time: never all of a long text at once.

        Args:
            receive: called with a position and the logits [rows, V] float32 after the tokens from there on, in order.
                From the engine's thread, so it must not call the engine; the rows are valid during the call only.
            first_row: the first position whose logits are wanted.
            lora: adapters at work.

        Raises:
            RequestError: tokens that cannot be computed (ContextOverflowError), or no such adapter.
            EngineError: the engine could not finish; also what `receive` raises.
        """
        ids = as_token_ids(token_ids)
        if not 0 <= first_row < max(1, len(ids)):
            raise RequestError(f"first_row must be from 0 to {len(ids) - 1} for {len(ids)} tokens, got {first_row}")
        evaluation = Evaluation(first_row, receive)
        self._thread.run_together([self._engine.prepare_prompt(ids, evaluation=evaluation, lora=lora)])

    def logits(self, token_ids: Seq[int], *, lora: Lora | None = None) -> Tensor:
        """Logits after each token: float32 [T, V], unnormalised, on the CPU. Every token is computed anew."""
        import torch

        slices: list[Tensor] = []
        self.each_logits(token_ids, lambda _first, rows: slices.append(rows.cpu()), lora=lora)
        return torch.cat(slices)

    def score(self, prompt: Prompt, continuation: Prompt, *, lora: Lora | None = None) -> list[float]:
        """The natural logarithm of the probability of each token of `continuation` after `prompt`.

        Raises:
            RequestError: an empty prompt or continuation; otherwise as for `generate`.
        """
        head = self._encode(prompt)
        tail = tuple(
            self.tokenizer.encode_continuation(continuation) if isinstance(continuation, str) else continuation
        )
        if not head or not tail:
            raise RequestError("expected a prompt and a continuation of at least one token each, got none")
        return self._collect(head + tail, first=len(head), top=0, lora=lora).values()

    def prompt_logprobs(self, prompt: Prompt, *, top: int = 0, lora: Lora | None = None) -> tuple[TokenLogprob, ...]:
        """How likely the model finds each token of a prompt after those before it.

        Args:
            top: how many of the most likely tokens to give at each place beside the token itself.

        Returns:
            One entry a token, BOS included; the first has no log-probability, since nothing comes before it. Values are
            the model's own, before any sampling parameter.

        Raises:
            RequestError: `top` out of range; otherwise as for `generate`.
        """
        return self._collect(self._encode(prompt), first=0, top=top, lora=lora).result(self._token_text)

    def _collect(self, token_ids: tuple[int, ...], *, first: int, top: int, lora: Lora | None) -> PromptLogprobs:
        from exl2_rag.llm.prompt_logprobs import PromptLogprobs

        found = PromptLogprobs(token_ids, top=top, first=first)
        self.each_logits(token_ids, found.receive, first_row=found.first_row, lora=lora)
        return found

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_bytes(token_id).decode(errors="replace")
