"""`SamplingParams`: how tokens are drawn and when to stop. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from exl2_rag.errors import RequestError
from exl2_rag.llm.sampling.ranges import RANGES

# What works on the distribution, in the order in which it does unless `sampler_order` says otherwise.
DEFAULT_ORDER = (
    "smoothing",
    "temperature",
    "top_k",
    "top_p",
    "top_a",
    "min_p",
    "tfs",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "mirostat",
    "xtc",
)
PLAIN_STAGES = frozenset(("temperature", "top_k", "top_p", "min_p"))  # what the kernel of a card can do, in this order
# Strings that end a repetition, as in DRY's first publication.
DEFAULT_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")

NegativePrompt = str | tuple[int, ...] | tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    Logits are treated in this order: guidance (`cfg_scale`); repetition, frequency and presence penalty; DRY;
    `no_repeat_ngram_size`; `logit_bias`; banned and allowed tokens, `min_tokens` and the constraint; then the stages
    of `sampler_order`, each on what the one before left; then the draw, which `skew` tilts. With temperature 0 the most
    likely token is taken before the stages of `sampler_order`.

    Attributes:
        max_tokens: new tokens at most; None: up to the model's context length.
        min_tokens: until so many new tokens are there, neither an end-of-sequence id, a stop id nor a stop string ends
            the text.
        temperature: 0 is greedy (the most likely token, ties to the lowest id).
        temperature_last: apply the temperature after all other stages.
        min_temp, max_temp, temp_exponent: dynamic temperature, in place of `temperature`, if max_temp is above 0:
            min_temp + (max_temp - min_temp) * e ** temp_exponent, e being the entropy as a share of the largest
            possible one.
        smoothing_factor, smoothing_curve: bend logits by a quadratic around the largest one (curve 1), or by a cubic
            (curve 3), or something between; factor 0 is off.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p; 1 is off.
        min_p: drop tokens less likely than min_p times the most likely one; 0 is off.
        top_a: drop tokens less likely than top_a times the square of the largest probability; 0 is off.
        typical_p: keep the tokens whose surprise is nearest to the entropy, until their mass reaches it; 1 is off.
        tfs: tail-free sampling: keep tokens until the curvature of the sorted probabilities is used up; 1 is off.
        epsilon_cutoff: drop tokens less likely than this; 0 is off.
        eta_cutoff: drop tokens less likely than min(eta, sqrt(eta) * exp(-entropy)); 0 is off.
        xtc_probability, xtc_threshold: with this probability drop all tokens at least as likely as the threshold,
            except the least likely of them; probability 0 is off.
        xtc_ignore_tokens: ids that are never dropped by it; None: the model's special tokens and those with a line end.
        skew: draw with u ** exp(-skew) in place of u, tokens in order of falling probability: above 0 favours the
            unlikely ones.
        mirostat_mode, mirostat_tau, mirostat_eta: 2 is mirostat 2.0: keep the observed surprise near tau (bits) by
            dropping tokens of more than mu bits, mu learning at rate eta; 0 is off.
        repetition_penalty: logits of tokens in the prompt or the text so far are divided (above 0) or multiplied
            (below) by it; 1 is off.
        frequency_penalty, presence_penalty: subtracted from the logits of tokens of the text so far, the prompt not
            counted: for every occurrence, and once; 0 is off.
        penalty_range: these three see only so many last tokens; None: all.
        penalty_decay: over so many tokens before the range, the penalties fall to nothing in a straight line.
        dry_multiplier, dry_base, dry_allowed_length, dry_range: "don't repeat yourself": a token that would lengthen a
            repetition of n tokens, n at least the allowed length, of the prompt or the text loses multiplier * base
            ** (n - allowed length); multiplier 0 is off. Only the last `dry_range` tokens count; None: all.
        dry_sequence_breakers: repetitions do not reach over tokens with these texts, nor over these token ids.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and text together; 0 is off.
        logit_bias: added to the logits of these token ids.
        banned_tokens: ids that are never drawn.
        allowed_tokens: only these ids are drawn; None: all. End-of-sequence ids that are to end the text belong in it.
        sampler_order: stages of `DEFAULT_ORDER` in another order; those left out follow in their usual order.
        cfg_scale, negative_prompt: classifier-free guidance: log-probabilities are s * a + (1 - s) * b, a after the
            prompt, b after the negative prompt (a text, token ids or chat messages), the new tokens being the same;
            without one, b is what follows the last prompt token alone. Scale 1 is off.
        logprobs: None: none; 0: of the tokens of the text; k: of the k most likely tokens beside each, too.
        seed: None draws a fresh one. With a seed the tokens do not depend on what else runs in the batch.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end the text, beside the model's own end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.
        n: continuations of one prompt, which is computed once. The first is the one that n = 1 gives; the others draw
            with seeds made from its seed. They come as `GenerationResult.choices`, or as pieces with an `index`.
        banned_strings: strings that never come, in whatever case: where one would be complete, the text goes back to
            the token in which it began and on with another one. What may become one is held back from streams.
        token_healing: the last tokens of the prompt, if a longer token could begin with them, are chosen anew together
            with what follows. `text` leaves them out, `token_ids` and `max_tokens` count them.
        speculate: let the engine's `draft_model`, if it has one, guess tokens ahead. Never changes the text.
        stages: those that have something to do, in the order in which they do it; worked out, not given.
        is_plain: whether temperature, top-k, top-p and min-p in their usual order are all there is; worked out.

    Raises:
        RequestError: a value is out of range.
    """

    max_tokens: int | None = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    temperature_last: bool = False
    min_temp: float = 0.0
    max_temp: float = 0.0
    temp_exponent: float = 1.0
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    top_a: float = 0.0
    typical_p: float = 1.0
    tfs: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_ignore_tokens: tuple[int, ...] | None = None
    skew: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_range: int | None = None
    penalty_decay: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int | None = None
    dry_sequence_breakers: tuple[str | int, ...] = DEFAULT_SEQUENCE_BREAKERS
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    banned_tokens: tuple[int, ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    sampler_order: tuple[str, ...] = DEFAULT_ORDER
    cfg_scale: float = 1.0
    negative_prompt: NegativePrompt | None = field(default=None, hash=False)
    logprobs: int | None = None
    n: int = 1
    speculate: bool = True
    banned_strings: tuple[str, ...] = ()
    token_healing: bool = False
    # Worked out once, since every step asks.
    stages: tuple[str, ...] = field(init=False, repr=False, compare=False)
    is_plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, values in RANGES.items():
            values.check(name, getattr(self, name))
        for one in fields(self):
            if isinstance(one.default, bool) and not isinstance(getattr(self, one.name), bool):
                raise RequestError(f"{one.name} must be True or False, got {getattr(self, one.name)!r}")
        self._set("stop", _strings("stop", self.stop))
        if any(not text for text in self.stop):
            raise RequestError("stop holds an empty string, which would end every text at once; remove it")
        self._set("banned_strings", _strings("banned_strings", self.banned_strings))
        for text in self.banned_strings:
            if not text or "\ufffd" in text:
                raise RequestError(
                    f"banned_strings must hold texts of at least one character and no U+FFFD, got {text!r}; remove it"
                )
        for name in ("stop_token_ids", "banned_tokens"):
            self._set(name, _token_ids(name, getattr(self, name)))
        for name in ("allowed_tokens", "xtc_ignore_tokens"):
            if getattr(self, name) is not None:
                self._set(name, _token_ids(name, getattr(self, name)))
        if self.allowed_tokens is not None and not set(self.allowed_tokens) - set(self.banned_tokens):
            raise RequestError("allowed_tokens leaves no token that may be drawn; name at least one that is not banned")
        self._set("logit_bias", _bias(self.logit_bias))
        self._set("dry_sequence_breakers", _breakers(self.dry_sequence_breakers))
        self._set("sampler_order", _order(self.sampler_order))
        self._check_pairs()
        self._set("stages", self._active_stages())
        self._set("is_plain", self._is_plain())

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without chance."""
        return self.temperature == 0

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance is asked for."""
        return self.cfg_scale != 1

    @property
    def reads_history(self) -> bool:
        """Whether the tokens before matter beyond the model's own logits."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
            or self.dry_multiplier > 0
            or self.no_repeat_ngram_size > 0
        )

    def _active_stages(self) -> tuple[str, ...]:
        listed = [*self.sampler_order, *(name for name in DEFAULT_ORDER if name not in self.sampler_order)]
        if self.temperature_last:
            listed = [*(name for name in listed if name != "temperature"), "temperature"]
        return tuple(name for name in listed if self._is_on(name))

    def _is_plain(self) -> bool:
        usual = [name for name in DEFAULT_ORDER if name in self.stages]
        return (
            (self.is_greedy or (self.max_temp == 0 and set(self.stages) <= PLAIN_STAGES and [*self.stages] == usual))
            and (self.is_greedy or self.skew == 0)
            and not (self.reads_history or self.is_guided or self.logit_bias or self.banned_tokens)
            and self.allowed_tokens is None
            and self.min_tokens == 0
            and self.logprobs is None
        )

    def _is_on(self, stage: str) -> bool:
        match stage:
            case "smoothing":
                return self.smoothing_factor > 0
            case "temperature":
                return self.max_temp > 0 or self.temperature != 1
            case "mirostat":
                return self.mirostat_mode == 2
            case "xtc":
                return self.xtc_probability > 0
            case "top_p" | "typical_p" | "tfs":
                return bool(getattr(self, stage) < 1)
            case _:
                return bool(getattr(self, stage) > 0)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_pairs(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if 0 < self.max_temp < self.min_temp:
            raise RequestError(f"min_temp must be at most max_temp ({self.max_temp}), got {self.min_temp}")
        if self.min_temp > 0 and self.max_temp == 0:
            raise RequestError(f"min_temp is {self.min_temp}, but max_temp is 0, which is off; give a max_temp, too")
        if self.penalty_decay and self.penalty_range is None:
            raise RequestError("penalty_decay begins where penalty_range ends, and that is None (all tokens); give one")
        if self.mirostat_mode == 1:
            raise RequestError("mirostat_mode must be 0 (off) or 2, got 1; mirostat 2.0 replaces the first version")
        if self.negative_prompt is not None:
            if not self.is_guided:
                raise RequestError("negative_prompt without guidance has no effect; give a cfg_scale other than 1")
            self._set("negative_prompt", _negative_prompt(self.negative_prompt))


def _items(name: str, values: Any, what: str) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a tuple of {what}, got {type(values).__name__} {values!r:.80}")
    return tuple(values)


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str):  # an easy mistake
        raise RequestError(f'{name} must be a tuple of strings, got the string {values!r}; write {name}=("…",)')
    items = _items(name, values, "strings")
    wrong = next((one for one in items if not isinstance(one, str)), None)
    if wrong is not None:
        raise RequestError(f"{name} must hold strings, got {wrong!r}")
    return items


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    return tuple(_token_id(name, one) for one in _items(name, values, "token ids"))


def _token_id(name: str, value: Any) -> int:
    try:
        token_id = -1 if isinstance(value, bool) else value.__index__()
    except AttributeError:
        token_id = -1
    if token_id < 0:
        raise RequestError(f"{name} must hold token ids (whole numbers of 0 or more), got {value!r}")
    return int(token_id)


def _bias(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {type(values).__name__} {values!r:.80}")
    finite = RANGES["frequency_penalty"]
    for token_id, value in values.items():
        if not finite.holds(value):
            raise RequestError(f"logit_bias must hold finite numbers, got {value!r} for {token_id!r}")
    return {_token_id("logit_bias", token_id): float(value) for token_id, value in values.items()}


def _breakers(values: Any) -> tuple[str | int, ...]:
    if isinstance(values, str):
        _strings("dry_sequence_breakers", values)
    items = _items("dry_sequence_breakers", values, "strings or token ids")
    if "" in items:
        raise RequestError("dry_sequence_breakers holds an empty string, which is in every text; remove it")
    return tuple(one if isinstance(one, str) else _token_id("dry_sequence_breakers", one) for one in items)


def _order(values: Any) -> tuple[str, ...]:
    items = _strings("sampler_order", values)
    for one in items:
        if one not in DEFAULT_ORDER:
            raise RequestError(f"sampler_order holds the unknown stage {one!r}; stages are {', '.join(DEFAULT_ORDER)}")
        if items.count(one) > 1:
            raise RequestError(f"sampler_order names {one!r} more than once; each stage runs once")
    return items


def _negative_prompt(value: Any) -> NegativePrompt:
    prompt = value if isinstance(value, str) else _items("negative_prompt", value, "token ids or chat messages")
    if not prompt:
        raise RequestError("negative_prompt is empty; leave it out to use the last token of the prompt")
    if isinstance(prompt, tuple) and not all(isinstance(one, Mapping) for one in prompt):
        return _token_ids("negative_prompt", prompt)
    return prompt
