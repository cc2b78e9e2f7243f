"""From a request to the sequence that carries it out: checked, with its text, constraint, samplers and branches.

Knows what a request may ask for; not who runs when, nor the state of the cache. Nothing here changes the engine, so it
is safe from any thread.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

from exl2_rag.errors import RequestError
from exl2_rag.llm.continuation import KEPT_BACK_TOKENS
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.guidance import accompany, negative_ids, room_for_two
from exl2_rag.llm.lora.choice import Lora, lora_identity
from exl2_rag.llm.output_text import OutputText, TokenDecoder
from exl2_rag.llm.prompt_logprobs import PromptLogprobs
from exl2_rag.llm.prompt_report import PromptReport, check_prompt
from exl2_rag.llm.request import GenerationRequest, SamplingParams, branch_seed
from exl2_rag.llm.sampler_setup import TokenTexts, sampler_state
from exl2_rag.llm.sequence import Evaluation, Sequence
from exl2_rag.llm.sources import source_positions

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import ConstraintMatcher
    from exl2_rag.llm.lora.shelf import LoraSet
    from exl2_rag.llm.token_healing import Healing


class TextTools(TokenTexts, Protocol):
    """What the engine needs to turn tokens into text and constraints into masks."""

    def decoder(self, prompt: tuple[int, ...]) -> TokenDecoder:
        """A fresh decoder for what follows the prompt."""
        ...

    def shown_text(self, token_ids: Seq[int]) -> str:
        """The text of any token ids, special tokens included, to be shown to people."""
        ...

    def matcher(self, request: GenerationRequest) -> ConstraintMatcher | None:
        """A fresh matcher of the request's constraint. Raises ConstraintError if it cannot be enforced."""
        ...

    def healing(self, prompt: tuple[int, ...]) -> Healing | None:
        """What of the prompt's end the continuation should begin with instead; None: nothing."""
        ...


class RequestPreparation:
    """Makes sequences.

    Args:
        config: sizes and limits.
        text: makes decoders and matchers.
        vocab_size: V, the width of the logits; prompts must stay below.
        eos_token_ids: ids that end a text, unless a request says otherwise.
        root: the root of the pages of a tenant's salt and a set of adapters.
        loras: the adapters of these names.
    """

    def __init__(
        self,
        config: EngineConfig,
        text: TextTools,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        root: Callable[[str | None, Iterable[tuple[str, float]]], bytes],
        loras: Callable[[Lora | None], LoraSet],
    ) -> None:
        self._config = config
        self._text = text
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._root = root
        self._loras = loras

    def text(self, request: GenerationRequest) -> Sequence:
        """The sequence of a request, and its branches.

        Raises:
            ContextOverflowError: the prompt leaves no room for a new token.
            RequestError: the prompt is empty or holds ids outside the vocabulary, or there is no such adapter.
            ConstraintError: the constraint cannot be enforced.
        """
        sampling, token_ids = request.sampling, request.token_ids
        check_prompt(token_ids, self._config, self._vocab_size, n_new=1)
        healing = self._healing(request)
        if healing is not None:
            token_ids = token_ids[: -healing.n_tokens]
        room = self._config.sequence_limit - len(token_ids)
        if sampling.is_guided:
            negative = negative_ids(sampling, request.token_ids)
            check_prompt(negative, self._config, self._vocab_size, n_new=1)
            room = room_for_two(self._config, token_ids, negative)
        stop_ids = frozenset(sampling.stop_token_ids)
        lora = self._loras(request.lora)
        # A constraint allows an end-of-sequence id only where its text is complete; nothing can follow it then.
        if request.constraint is not None or not sampling.ignore_eos:
            stop_ids |= self._eos_token_ids
        collector = None
        if request.prompt_logprobs is not None:
            collector = PromptLogprobs(token_ids, top=request.prompt_logprobs)
        sequence = Sequence(
            token_ids,
            max_new_tokens=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            sampling=sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            output=OutputText(
                self._text.decoder(token_ids),
                sampling.stop,
                sampling.banned_strings,
                n_hidden=0 if healing is None else healing.n_characters,
                n_kept_back=KEPT_BACK_TOKENS if sampling.banned_strings and request.constraint is not None else 0,
            ),
            stop_token_ids=stop_ids,
            matcher=self._text.matcher(request),
            sampler=sampler_state(sampling, token_ids, stop_ids, self._text, self._vocab_size),
            healing=healing,
            cache_root=self._root(request.cache_salt, lora_identity(lora)),
            lora=lora,
            priority=request.priority,
            timeout_s=request.timeout_s,
            sources=source_positions(request.sources),
            evaluation=None if collector is None else Evaluation(0, collector.receive),
            prompt_logprobs=collector,
            prompt_report=PromptReport(request.dropped_messages, request.dropped_tokens),
        )
        if sampling.is_guided:
            accompany(sequence, negative)
        sequence.branches = self._branches(request, sequence.seed)
        return sequence

    def prompt(
        self,
        token_ids: tuple[int, ...],
        *,
        keep_pages: bool = False,
        evaluation: Evaluation | None = None,
        cache_salt: str | None = None,
        lora: Lora | None = None,
        pin_ttl_s: float | None = None,
    ) -> Sequence:
        """A sequence that only computes its prompt: to warm the cache, to pin it, or to read logits.

        Raises:
            ContextOverflowError, RequestError: as for `text`.
        """
        check_prompt(token_ids, self._config, self._vocab_size, n_new=0)
        adapters = self._loras(lora)
        return Sequence(
            token_ids,
            max_new_tokens=0,
            sampling=SamplingParams(),
            evaluation=evaluation,
            keep_pages=keep_pages,
            pin_ttl_s=pin_ttl_s,
            cache_root=self._root(cache_salt, lora_identity(adapters)),
            lora=adapters,
        )

    def _healing(self, request: GenerationRequest) -> Healing | None:
        if not request.sampling.token_healing:
            return None
        if request.constraint is not None:
            raise RequestError(
                "token_healing cannot go together with a constraint, which begins where the prompt ends; leave one out"
            )
        return self._text.healing(request.token_ids)

    def _branches(self, request: GenerationRequest, seed: int) -> tuple[Sequence, ...]:
        """The other continuations of a request for several; each is a request of its own with a seed of its own."""
        branches = []
        for index in range(1, request.sampling.n):
            sampling = dataclasses.replace(request.sampling, n=1, seed=branch_seed(seed, index))
            branch = self.text(dataclasses.replace(request, sampling=sampling, prompt_logprobs=None))
            branch.index = index
            branches.append(branch)
        return tuple(branches)
