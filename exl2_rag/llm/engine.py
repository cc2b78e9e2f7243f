"""The engine: requests in, pieces of text out, one step at a time. Synchronous and single-threaded.

A step plans (scheduler), computes (model runner), and samples. What goes wrong with one request (its constraint, its
logits, its text) ends that request alone. `prepare` may be called from any thread; everything else from one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from exl2_rag.errors import EngineError, Exl2RagError
from exl2_rag.llm.continuation import Continuation
from exl2_rag.llm.drawing import Ready, draw_each
from exl2_rag.llm.engine_cache import EngineCache, Loras
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.fingerprint import CacheIdentity, root_key
from exl2_rag.llm.guidance import when_both_are_there
from exl2_rag.llm.lora.choice import Lora
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.next_tokens import allowed_next
from exl2_rag.llm.page_table import PageTable
from exl2_rag.llm.prefill_rate import PrefillRate
from exl2_rag.llm.prompt_report import final_report
from exl2_rag.llm.request import FinishReason, GenerationRequest, StreamPiece
from exl2_rag.llm.request_preparation import RequestPreparation, TextTools
from exl2_rag.llm.sampler import DrawnToken
from exl2_rag.llm.sampler_setup import next_draw
from exl2_rag.llm.sampling.draw import Draw
from exl2_rag.llm.scheduler import Scheduler, Slice, StepPlan
from exl2_rag.llm.sequence import Evaluation, Sequence, State
from exl2_rag.llm.speculation.speculator import Speculator
from exl2_rag.llm.tenants import Tenants

if TYPE_CHECKING:
    from exl2_rag.llm.kv_store.tiers import CacheTiers


@dataclass(frozen=True, slots=True)
class Update:
    """News of one sequence: a piece, the last of which has a finish reason, or the error that ended it."""

    sequence: Sequence
    piece: StreamPiece | None = None
    error: Exl2RagError | None = None

    @property
    def is_last(self) -> bool:
        """Whether the sequence has ended."""
        return self.error is not None or (self.piece is not None and self.piece.finish_reason is not None)


class Engine(EngineCache):
    """Runs many requests over one model and one KV cache.

    Args:
        runner: the model and its cache.
        config: sizes and limits; the cache must have its pages.
        text: makes decoders and matchers.
        vocab_size: V, the width of the logits; prompts must stay below.
        eos_token_ids: ids that end a text, unless a request says otherwise.
        identity: what the contents of the cache depend on beside the tokens. Needed where they outlive the process.
        loras: the adapters that requests may name; None: there are none.
        tiers: where pages go that have no room in the cache, or are to survive the process.
        speculator: gives sequences drafts of their next tokens; None: nobody does.
        clock: seconds, by which pins expire.
    """

    _text: TextTools

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        text: TextTools,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        identity: CacheIdentity | None = None,
        loras: Loras | None = None,
        tiers: CacheTiers | None = None,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._runner = runner
        self._text = text
        self._speculator = speculator
        self._continuation = Continuation(text.token_text, self._forget_rows)
        self._vocab_size = vocab_size
        self.identity = identity
        self._loras = loras
        self.tiers = tiers
        self._clock = clock
        digest = b"" if identity is None else identity.digest()
        self._tenants = Tenants(lambda salt, lora: root_key(digest, salt=salt, lora=lora))
        self._preparation = RequestPreparation(
            config,
            text,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            root=self.cache_root,
            loras=self._lora_set,
        )
        self._prefill_rate = PrefillRate()
        self._scheduler = self._fresh_scheduler()
        self.n_computed_last = 0  # tokens of the last step
        self._n_prompt_tokens = 0
        self._n_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        is_saving = self.tiers is not None and self.tiers.has_work
        return bool(self._scheduler.running or self._scheduler.waiting or is_saving)

    @property
    def queue_lengths(self) -> tuple[int, int]:
        """How many sequences run, and how many wait. May be read from any thread."""
        return len(self._scheduler.running), len(self._scheduler.waiting)

    def prepare(self, request: GenerationRequest) -> Sequence:
        """Check a request and make what it needs, without queueing it. Safe from any thread.

        Raises:
            ContextOverflowError, RequestError, ConstraintError: see `RequestPreparation.text`.
        """
        return self._preparation.text(request)

    def prepare_prompt(
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
            ContextOverflowError, RequestError: as for `prepare`.
        """
        return self._preparation.prompt(
            token_ids,
            keep_pages=keep_pages,
            evaluation=evaluation,
            cache_salt=cache_salt,
            lora=lora,
            pin_ttl_s=pin_ttl_s,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a prepared sequence, and its branches with it.

        Raises:
            ConstraintError: its constraint gives up.
            QueueFullError: too many wait already.
            PinLimitError: its pages are to be kept, and would leave too little of the cache for requests.
        """
        if sequence.keep_pages:
            coming = [*self._scheduler.waiting, *self._scheduler.running]
            self._scheduler.pins.check(sequence, [one for one in coming if one.keep_pages])
        for one in (sequence, *sequence.branches):
            if one.matcher is not None:
                # What must come first needs no sampling; the last token is left to be sampled, to end the text
                # properly.
                self._continuation.append_forced(one, at_most=one.max_new_tokens - 1)
        self._scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Cancel a sequence, queued or running; its pages are free at once. Harmless when it has ended."""
        self._scheduler.remove(sequence)

    def close(self) -> None:
        """Write what is still to be written to the store, and close it. Nothing runs any more."""
        if self.tiers is not None:
            self.tiers.close()

    def step(self) -> list[Update]:
        """Run one step and say what is new.

        Raises:
            Exception: anything that concerns all sequences; then `reset` is due.
        """
        started = time.perf_counter()
        expired = self._scheduler.expire(started)
        drafting_s = 0.0
        if self._speculator is not None:
            self._speculator.draft(self._scheduler.running)
            drafting_s = time.perf_counter() - started
        plan = self._scheduler.plan()
        updates = [Update(sequence, error=error) for sequence, error in (*expired, *plan.failures)]
        self._runner.copy_rows(plan.copies)
        self.n_computed_last = sum(one.n_rows for one in plan.slices)
        if self.tiers is not None:
            self.tiers.save_some(others_run=bool(plan.slices))
        if not plan.slices:
            return updates
        n_prefill = sum(one.n_tokens for one in plan.slices if not one.sequence.is_decoding)
        n_decode = sum(one.n_rows for one in plan.slices) - n_prefill
        rows = self._runner.run(plan.slices)
        self._scheduler.complete(plan)
        if self.tiers is not None:
            for one in plan.slices:
                self.tiers.computed(one.sequence)
        to_sample: list[Ready] = []
        for one, logits in zip(plan.slices, rows, strict=True):
            last = logits if one.sequence.evaluation is None else logits[-1:]
            if update := self._advance_prompt(one, logits):
                updates.append(update)
            elif one.sequence.max_new_tokens > 0 and one.reaches_end:
                to_sample.append(Ready(one, last))
        updates += self._advance_texts(to_sample)
        aside_s = 0.0 if self.tiers is None else self.tiers.take_spent_s()
        elapsed_s = time.perf_counter() - started - aside_s
        self._scheduler.measured(plan, elapsed_s)
        self._prefill_rate.note(n_prefill, n_decode, elapsed_s)
        if self._speculator is not None:
            self._speculator.note_step(plan.slices, elapsed_s - drafting_s)
        if self.tiers is not None:
            self.tiers.rates.prefill_tokens_per_s = self._prefill_rate.tokens_per_s
        return updates

    def reset(self) -> None:
        """Forget all sequences and the whole cache, after a step that failed as a whole."""
        self._scheduler.forget_all()
        self._scheduler = self._fresh_scheduler()

    def _fresh_scheduler(self) -> Scheduler:
        table = PageTable(self.config.n_pages, self.config.page_size, self.cache_root())
        scheduler = Scheduler(table, self.config, self._clock)
        if self.tiers is not None:
            self.tiers.attach(table)
            scheduler.restore = self._restore
            scheduler.pins.on_release = self.tiers.unpinned
        return scheduler

    def _restore(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Bring back pages of a sequence that is about to be admitted; False if there is no time for more now."""
        assert self.tiers is not None

        def carry_out_copies() -> None:
            self._runner.copy_rows(plan.copies)
            plan.copies.clear()

        return self.tiers.restore(sequence, carry_out_copies, others_run=bool(self._scheduler.running))

    def _advance_prompt(self, one: Slice, logits: Tensor) -> Update | None:
        """Hand on the logits that are asked for; end a sequence that only computes its prompt, when that is done."""
        sequence = one.sequence
        if sequence.evaluation is not None and logits.shape[0]:
            receive, first = sequence.evaluation.receive, one.start + one.n_tokens - logits.shape[0]
            error = _failure(lambda: receive(first, logits))
            if error is not None:
                return self._fail(sequence, error)
        if not one.reaches_end:
            return None
        sequence.evaluation = None  # a text that goes on, or comes back after a preemption, needs no row of it again
        if sequence.max_new_tokens > 0:
            return None
        sequence.mark_progress()
        return self._finish(sequence, "stop")

    def _advance_texts(self, ready: list[Ready]) -> list[Update]:
        """Sample tokens of each sequence as long as its logits are there: one, and one more for each token of its draft
        that turns out to be right.
        """
        updates: list[Update] = []
        drafted = [one for one in ready if one.draft]
        while ready:
            updates += self._advance_text([(one.sequence, one.logits[one.n_right : one.n_right + 1]) for one in ready])
            ready = [one for one in ready if one.draft and self._goes_on(one)]
        if self._speculator is not None:
            for one in drafted:
                self._speculator.learn(one.sequence, len(one.draft), one.n_right)
        return updates

    def _goes_on(self, one: Ready) -> bool:
        """Whether all tokens since the step are those of the draft, so that the logits after the last are there."""
        sequence = one.sequence
        taken = sequence.token_ids[one.end :]
        if sequence.state is not State.RUNNING or len(taken) <= one.n_right or tuple(taken) != one.draft[: len(taken)]:
            return False
        one.n_right = len(taken)
        self._scheduler.keep_drafted(sequence)
        return True

    def _advance_text(self, ready: list[tuple[Sequence, Tensor]]) -> list[Update]:
        """Sample the next token of each sequence whose logits are there; say what is new."""
        updates: list[Update] = []
        draws: list[Draw] = []
        drawn: list[tuple[Sequence, Tensor]] = []
        for sequence, logits, negative in when_both_are_there(self._with_branches(ready)):
            sequence.mark_progress()
            if sequence.finish_reason is None and sequence.matcher is not None and sequence.matcher.is_finished:
                sequence.finish_reason = "stop"
            if sequence.finish_reason is not None:  # by tokens that were forced before the first step
                updates.append(self._finish(sequence, sequence.finish_reason))
                continue
            try:
                allowed = allowed_next(sequence, self._vocab_size)
            except Exception as error:
                updates.append(self._fail(sequence, error))
                continue
            if sequence.bans and allowed is not None and not allowed.any():
                updates += self._leave_dead_end(sequence)
                continue
            draws.append(next_draw(sequence, allowed, negative))
            drawn.append((sequence, logits))
        for (sequence, _), choice in zip(drawn, draw_each([row for _, row in drawn], draws), strict=True):
            if isinstance(choice, Exception):
                has_bans = len(sequence.token_ids) in sequence.bans
                updates += self._leave_dead_end(sequence) if has_bans else [self._fail(sequence, choice)]
            elif (update := self._take(sequence, choice)) is not None:
                updates.append(update)
        return updates

    def _with_branches(self, ready: list[tuple[Sequence, Tensor]]) -> list[tuple[Sequence, Tensor]]:
        """Fork what is to be continued in several ways; all branches sample from the logits of their prompt."""
        forked: list[tuple[Sequence, Tensor]] = []
        for sequence, logits in ready:
            forked.append((sequence, logits))
            if sequence.branches and not sequence.has_forked:
                self._runner.copy_rows(self._scheduler.fork(sequence))
                forked += [(one, logits) for one in sequence.branches if one.state is not State.ENDED]
        return forked

    def _forget_rows(self, sequence: Sequence) -> None:
        self._scheduler.forget_rows(sequence)

    def _leave_dead_end(self, sequence: Sequence) -> list[Update]:
        error = _failure(lambda: self._continuation.leave_dead_end(sequence))
        return [] if error is None else [self._fail(sequence, error)]

    def _take(self, sequence: Sequence, choice: DrawnToken) -> Update | None:
        """Append a sampled token, and what a constraint forces after it."""

        error = _failure(lambda: self._continuation.take(sequence, choice))
        if error is not None:
            return self._fail(sequence, error)
        if sequence.finish_reason is not None:
            return self._finish(sequence, sequence.finish_reason)
        piece = self._piece(sequence)
        return None if piece is None else Update(sequence, piece)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Update:
        sequence.finish_reason = reason
        try:
            piece = self._piece(sequence)
        except Exception as error:
            return self._fail(sequence, error)
        if self.tiers is not None:
            self.tiers.finished(sequence)
        if sequence.keep_pages:
            self._scheduler.pin(sequence)
        else:
            self._scheduler.remove(sequence)
        if sequence.index == 0:  # its branches had the prompt from it
            usage = sequence.usage()
            self._n_prompt_tokens += usage.prompt_tokens
            self._n_cached_tokens += usage.cached_tokens
            self._tenants.note(sequence.cache_root, usage.prompt_tokens, usage.cached_tokens)
        return Update(sequence, piece)

    def _fail(self, sequence: Sequence, error: Exception) -> Update:
        self._scheduler.remove(sequence)
        return Update(sequence, error=as_engine_error(error, "this request failed"))

    def _piece(self, sequence: Sequence) -> StreamPiece | None:
        """What has not been handed out yet; None if nothing can be."""
        is_last = sequence.finish_reason is not None
        text, n_tokens = "", sequence.n_new
        if sequence.output is not None:
            if is_last:
                sequence.output.finish()
            text = sequence.output.take()
            if not is_last:  # a token goes out with its text
                n_tokens = sequence.output.n_tokens_taken
        if not (text or is_last):
            return None
        token_ids = tuple(sequence.token_ids[sequence.n_prompt + sequence.n_handed_out : sequence.n_prompt + n_tokens])
        logprobs = None
        if sequence.logprobs is not None:
            logprobs = tuple(sequence.logprobs[sequence.n_handed_out : sequence.n_handed_out + len(token_ids)])
        sequence.n_handed_out += len(token_ids)
        if not is_last:
            return StreamPiece(text, token_ids, index=sequence.index, logprobs=logprobs)
        return StreamPiece(
            text,
            token_ids,
            sequence.finish_reason,
            sequence.usage(),
            sequence.timings(),
            index=sequence.index,
            logprobs=logprobs,
            cache_explain=self._explanation(sequence),
            speculation=None if self._speculator is None else sequence.speculation.result(),
            prompt=final_report(sequence, self._text.token_text),
        )


def as_engine_error(error: BaseException, what: str) -> Exl2RagError:
    """Our own errors as they are, any other wrapped, so that callers have one tree to catch."""
    if isinstance(error, Exl2RagError):
        return error
    wrapped = EngineError(f"{what}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _failure(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None
