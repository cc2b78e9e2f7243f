"""Native objects of LangChain and LlamaIndex over one engine. Translation only: no logic of their own.

Importing this package imports neither framework; the functions below do, when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exl2_rag.errors import SettingsError

if TYPE_CHECKING:
    from exl2_rag.adapters.langchain import ChatExL2
    from exl2_rag.adapters.llama_index import ExL2 as LlamaIndexExL2
    from exl2_rag.llm.api import ExL2LLM

__all__ = ["as_langchain", "as_llama_index", "langchain_runnable"]


def as_langchain(llm: ExL2LLM, **options: Any) -> ChatExL2:
    """A LangChain chat model over `llm`.

    Args:
        llm: the engine; it is shared, not copied.
        options: keywords of `ChatExL2`, such as `temperature`.

    Raises:
        SettingsError: langchain-core is not installed.
    """
    try:
        import langchain_core  # noqa: F401
    except ImportError as error:
        raise _missing("langchain-core", extra="langchain") from error
    from exl2_rag.adapters.langchain import ChatExL2

    return ChatExL2(llm=llm, **options)


def as_llama_index(llm: ExL2LLM, **options: Any) -> LlamaIndexExL2:
    """A LlamaIndex model over `llm`.

    Args:
        llm: the engine; it is shared, not copied.
        options: keywords of `exl2_rag.adapters.llama_index.ExL2`, such as `temperature`.

    Raises:
        SettingsError: llama-index-core is not installed.
    """
    try:
        import llama_index.core  # noqa: F401
    except ImportError as error:
        raise _missing("llama-index-core", extra="llama-index") from error
    from exl2_rag.adapters.llama_index import ExL2

    return ExL2(llm=llm, **options)


def langchain_runnable(llm: ExL2LLM, model_input: Any) -> ChatExL2:
    """The chat model that shall take `model_input`; what `ExL2LLM.__call__` returns.

    LangChain turns a callable in a pipe into a RunnableLambda, and when the function returns a Runnable, LangChain
    invokes that with the same input. So `prompt | llm | StrOutputParser()` streams, batches and is async.

    Raises:
        SettingsError: the input is not what a chat model takes, or langchain-core is not installed.
    """
    model = as_langchain(llm)
    from langchain_core.prompt_values import PromptValue

    is_messages = isinstance(model_input, list | tuple) and len(model_input) > 0
    if not (isinstance(model_input, str | PromptValue) or is_messages):
        raise SettingsError(
            "expected a prompt, a string or a list of messages, as a LangChain pipe passes on; "
            f"got {type(model_input).__name__}. Outside a pipe use llm.generate(…) or llm.chat(…)"
        )
    return model


def _missing(package: str, *, extra: str) -> SettingsError:
    return SettingsError(f"this needs {package}, which is not installed; run: pip install 'exl2-rag[{extra}]'")
