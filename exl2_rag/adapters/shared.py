"""What the adapters of both frameworks share: the engine behind them and the parameters of a call.

Knows no framework.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, PrivateAttr

from exl2_rag.errors import SettingsError
from exl2_rag.llm.request import SamplingParams, Usage

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.llm.constraint import Constraint

DEFAULTS = SamplingParams()
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
# What else of `SamplingParams` may be given by name. Of `n` and `logprobs` the frameworks' results show nothing here.
MORE_SAMPLING_OPTIONS = tuple(
    one.name
    for one in fields(SamplingParams)
    if one.init and one.name not in (*SAMPLING_OPTIONS, "stop", "n", "logprobs")
)
# Options of a call that ask for what is not there yet. Ignoring them would pass off free text as obeying them.
NOT_YET = {
    "tools": "tool calling",
    "tool_choice": "tool calling",
    "functions": "tool calling",
    "response_format": "structured output",
}
HANDLE_METHODS = ("generate", "stream", "chat", "stream_chat", "agenerate", "astream", "achat", "astream_chat")

_handles: dict[Path, ExL2LLM] = {}
_handles_lock = threading.Lock()


def not_yet(feature: str) -> SettingsError:
    """The error for a feature the adapters do not have yet."""
    return SettingsError(
        f"{feature} is not supported by this adapter yet; free text, streaming and `constraint=` of a call are. "
        "For JSON that obeys a schema use llm.chat(messages, constraint=JsonSchema(schema))"
    )


def shared_handle(model_dir: str | Path) -> ExL2LLM:
    """The engine of a model directory: loaded by the first who asks, then shared until it is closed.

    Raises:
        ModelError: the directory holds no usable model; the message names it.
    """
    from exl2_rag.llm.api import ExL2LLM

    path = Path(model_dir).expanduser().resolve()
    with _handles_lock:
        handle = _handles.get(path)
        if handle is None or handle.closed:
            handle = _handles[path] = ExL2LLM(path)
        return handle


@dataclass(frozen=True)
class CallOptions:
    """What one call asks of the engine beside its prompt."""

    sampling: SamplingParams
    constraint: Constraint | None


class EngineAdapter(BaseModel):
    """Fields and helpers of every adapter over the engine, mixed into the framework's own class.

    Attributes:
        llm: the engine to use; or
        model_dir: a model directory, loaded once and shared by all adapters that name it.
        max_tokens, temperature, top_k, top_p, min_p, seed, stop: as in `SamplingParams`; a call may override each.
        sampling: further fields of `SamplingParams` by name, such as {"repetition_penalty": 1.1}; a call may give each
            of them as a keyword.
    """

    llm: Any = Field(default=None, exclude=True, repr=False)
    model_dir: str | Path | None = None
    max_tokens: int | None = DEFAULTS.max_tokens
    temperature: float = DEFAULTS.temperature
    top_k: int = DEFAULTS.top_k
    top_p: float = DEFAULTS.top_p
    min_p: float = DEFAULTS.min_p
    seed: int | None = None
    stop: list[str] | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)

    # Not the field `llm`: frameworks build copies from the fields, and a copy with another model_dir must load that.
    _handle: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Find the engine and check the sampling defaults, so that mistakes show at once."""
        super().model_post_init(context)
        self._handle = _find_handle(self.llm, self.model_dir)
        self.call_options(None, {})

    @property
    def engine(self) -> ExL2LLM:
        """The engine behind this adapter."""
        handle: ExL2LLM = self._handle
        return handle

    def call_options(self, stop: Sequence[str] | None, options: Mapping[str, Any]) -> CallOptions:
        """Join the defaults of this adapter with the options of one call; the call wins, and nothing sticks.

        Raises:
            SettingsError: an unknown option, or one for a feature that is not there yet.
            RequestError: a value out of range.
        """
        if unknown := [name for name in self.sampling if name not in MORE_SAMPLING_OPTIONS]:
            raise SettingsError(
                f"unknown option {unknown[0]!r} in sampling; expected some of: {', '.join(MORE_SAMPLING_OPTIONS)}"
            )
        values = {**{name: getattr(self, name) for name in SAMPLING_OPTIONS}, **self.sampling}
        constraint: Constraint | None = None
        for name, value in options.items():
            if name in values or name in MORE_SAMPLING_OPTIONS:
                values[name] = value
            elif name == "constraint":
                constraint = value
            elif name in NOT_YET:
                if value:
                    raise not_yet(NOT_YET[name])
            else:
                known = ", ".join([*SAMPLING_OPTIONS, "stop", "constraint", *MORE_SAMPLING_OPTIONS])
                raise SettingsError(f"unknown option {name}={value!r} of a call; expected one of: {known}")
        stops = self.stop if stop is None else stop
        if isinstance(stops, str):
            raise SettingsError(f"stop must be a list of strings, got the string {stops!r}; write stop=[{stops!r}]")
        return CallOptions(SamplingParams(**values, stop=tuple(stops or ())), constraint)

    def identity(self) -> dict[str, Any]:
        """The model and every default that changes its output.

        The default stop strings are not called `stop`: LangChain overwrites that key with those of the call, and two
        adapters would then share cached answers.
        """
        values = {name: getattr(self, name) for name in SAMPLING_OPTIONS}
        more = {"sampling": dict(sorted(self.sampling.items()))} if self.sampling else {}
        return {"model_name": self.engine.model_name, **values, "default_stop": list(self.stop or ()), **more}


def _find_handle(llm: Any, model_dir: str | Path | None) -> ExL2LLM:
    if (llm is None) == (model_dir is None):
        given = "neither" if llm is None else "both"
        raise SettingsError(f"expected either llm=<ExL2LLM> or model_dir=<directory>, got {given}")
    if model_dir is not None:
        return shared_handle(model_dir)
    if missing := [name for name in HANDLE_METHODS if not callable(getattr(llm, name, None))]:
        raise SettingsError(
            f"llm must be an ExL2LLM, got {type(llm).__name__}, which has no {missing[0]}(); "
            "to name a model directory write model_dir=…"
        )
    handle: ExL2LLM = llm
    return handle


def usage_counts(usage: Usage) -> dict[str, Any]:
    """Token counts under the names most tools look for."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
