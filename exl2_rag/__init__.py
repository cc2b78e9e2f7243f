"""exl2-rag: an inference engine for EXL2 models, made for document-grounded apps.

Names are loaded when they are first used, so that `import exl2_rag` is quick and brings in neither torch nor a
framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exl2_rag.errors import Exl2RagError
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.llm.constraint import Choice, JsonSchema, Regex
    from exl2_rag.llm.request import GenerationResult, SamplingParams, StreamPiece, Usage

    __version__: str

__all__ = [
    "Choice",
    "ExL2LLM",
    "Exl2RagError",
    "GenerationResult",
    "JsonSchema",
    "Regex",
    "SamplingParams",
    "StreamPiece",
    "Usage",
    "__version__",
]

_HOMES = {
    "Choice": "exl2_rag.llm.constraint",
    "ExL2LLM": "exl2_rag.llm.api",
    "Exl2RagError": "exl2_rag.errors",
    "GenerationResult": "exl2_rag.llm.request",
    "JsonSchema": "exl2_rag.llm.constraint",
    "Regex": "exl2_rag.llm.constraint",
    "SamplingParams": "exl2_rag.llm.request",
    "StreamPiece": "exl2_rag.llm.request",
    "Usage": "exl2_rag.llm.request",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata  # slow to import, and rarely asked for

    try:
        return metadata.version("exl2-rag")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
