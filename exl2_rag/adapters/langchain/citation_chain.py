"""`citation_chain`: a question in, an `Answer` with verified quotes out, as a LangChain runnable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_core.runnables import Runnable, RunnableLambda

from exl2_rag.adapters.langchain.chat_model import ChatExL2
from exl2_rag.qa.pipeline import DocumentQA

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.qa.answer import Answer
    from exl2_rag.qa.settings import QASettings
    from exl2_rag.retrieval import DocumentIndex, Retriever


def citation_chain(
    llm: ExL2LLM | ChatExL2, index: DocumentIndex | Retriever, settings: QASettings | None = None
) -> Runnable[str, Answer]:
    """Retrieve, prompt, generate under the quote constraint and verify, as one step of a chain.

    The prompt goes to the engine as token blocks, so that equal documents hit the KV cache; a chat prompt of LangChain
    would be tokenised as one text. `invoke`, `ainvoke` and `batch` work as on any runnable; a cancelled `ainvoke`
    cancels the request.

    Args:
        llm: the engine, or the chat model over it.
        index: an index, or a retriever over one.
        settings: None: what the model's card says, else the defaults of `QASettings`.
    """
    engine = llm.engine if isinstance(llm, ChatExL2) else llm
    answers = DocumentQA(engine, index, settings)

    def ask(question: str) -> Answer:
        return answers.ask(question)

    async def aask(question: str) -> Answer:
        return await answers.aask(question)

    return RunnableLambda(ask, afunc=aask, name="citation_chain")
