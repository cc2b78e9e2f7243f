"""Which fields of `SamplingParams` the engine honours; the others are refused, not ignored."""

from __future__ import annotations

from dataclasses import fields

from exl2_rag.errors import RequestError
from exl2_rag.llm.sampling.params import SamplingParams

NOT_YET = ("cfg_scale", "negative_prompt")


def refuse_unhonoured(params: SamplingParams) -> None:
    """Refuse parameters that would have no effect.

    Raises:
        RequestError: a field that is not honoured differs from its default; the message names it.
    """
    default = SamplingParams()
    for one in fields(params):
        value = getattr(params, one.name)
        if one.name in NOT_YET and value != getattr(default, one.name):
            raise RequestError(f"{one.name}={value!r} is not available in this version; leave it out")
