"""Questions about documents, answered with verified quotes. The only place that knows both `llm` and `retrieval`.

Names are loaded when they are first used, so that the prompt form can be read without an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exl2_rag.qa.answer import Answer, Citation, Claim, RejectedClaim
    from exl2_rag.qa.citations import verify_quote
    from exl2_rag.qa.pipeline import DocumentQA
    from exl2_rag.qa.settings import QASettings

__all__ = ["Answer", "Citation", "Claim", "DocumentQA", "QASettings", "RejectedClaim", "verify_quote"]

_HOMES = {
    "Answer": "answer",
    "Citation": "answer",
    "Claim": "answer",
    "DocumentQA": "pipeline",
    "QASettings": "settings",
    "RejectedClaim": "answer",
    "verify_quote": "citations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
