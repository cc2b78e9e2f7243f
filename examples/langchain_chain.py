"""Ask the demo documents through a LangChain chain: retriever | prompt | model | parser.

    python examples/langchain_chain.py [MODEL_DIR] [--index DIR]

The prompt is the form the demo model was trained on; with another model write your own. Documents come before the
question and in a fixed order, so that the next question about them finds them in the KV cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough

from exl2_rag import ExL2LLM
from exl2_rag.adapters.langchain import ExL2Retriever
from exl2_rag.demo import model_dir
from exl2_rag.llm.constraint import AnswerWithQuotes
from exl2_rag.qa.answer import parse_reply
from exl2_rag.qa.prompt import SYSTEM_TEXT, block_title, document_block, label_order, question_block
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval import DocumentIndex
from exl2_rag.retrieval.sentences import split_sentences

DOCUMENTS = Path(__file__).parent / "document_qa" / "documents"
QUESTIONS = (
    "How many sequences does the settings file cpu-small compute at once?",
    "What is the default page size of the cache?",
    "What is the default page size of the cache?",  # again: now its prompt is in the cache
)

PROMPT = ChatPromptTemplate.from_messages([SystemMessage(SYSTEM_TEXT), ("user", "{documents}{question}")])


def build_chain(llm: ExL2LLM, index: DocumentIndex) -> Runnable[str, list[dict[str, Any]]]:
    """A chain from a question to a list of claims, each with its quote, file and offset."""
    settings = QASettings.for_model(llm.model_dir)
    retriever = ExL2Retriever(index=index, k=settings.k)
    chat = llm.as_langchain(temperature=0, max_tokens=settings.max_tokens)

    def answer(found: dict[str, Any]) -> Runnable[Any, list[dict[str, Any]]]:
        documents = sorted(found["documents"], key=lambda document: label_order(document.metadata["label"]))
        inputs = {
            "documents": "".join(show(document, index.delimiter) for document in documents),
            "question": question_block(index.delimiter, found["question"]),
        }
        quotable = {document.metadata["label"]: sentences(document) for document in documents}
        model = chat.bind(constraint=AnswerWithQuotes(quotable, max_claims=settings.max_claims))
        parse = StrOutputParser() | (lambda reply: cite(reply, documents))
        return RunnableLambda(lambda _: inputs) | PROMPT | model | parse

    return RunnableParallel(documents=retriever, question=RunnablePassthrough()) | RunnableLambda(answer)


def show(document: Document, delimiter: str) -> str:
    """A retrieved chunk as the prompt shows it."""
    about = document.metadata
    title = block_title(about["title"], about["heading"])
    return document_block(delimiter, about["label"], title, document.page_content)


def sentences(document: Document) -> list[str]:
    """What may be quoted of a chunk: its whole sentences."""
    text = document.page_content
    return [text[start:end] for start, end in split_sentences(text)]


def cite(reply: str, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The claims of a reply with the place of each quote."""
    by_label = {document.metadata["label"]: document for document in documents}
    claims = []
    for claim in parse_reply(reply).claims:
        document = by_label[claim.source]
        start = document.metadata["start"] + document.page_content.index(claim.quote)
        place = {"source": document.metadata["source"], "page": document.metadata["page"], "start": start}
        claims.append({"text": claim.text, "quote": claim.quote, **place})
    return claims


def main(arguments: Sequence[str] | None = None) -> list[list[dict[str, Any]]]:
    """Run the example; returns the claims of each answer."""
    parser = argparse.ArgumentParser(description="Ask the demo documents.")
    parser.add_argument("model", nargs="?", type=Path, default=None, help="model directory; left out: the demo model")
    parser.add_argument("--index", type=Path, default=Path(".exl2-rag/examples"), help="where the index is kept")
    options = parser.parse_args(arguments)
    answers = []
    with ExL2LLM(options.model or model_dir()) as llm, DocumentIndex.create_or_open(options.index) as index:
        report = index.update(DOCUMENTS)
        print(f"{report.n_chunks} chunks; read {len(report.indexed)} documents, {len(report.unchanged)} were unchanged")
        chain = build_chain(llm, index)
        for question in QUESTIONS:
            usage = UsageMetadataCallbackHandler()
            claims = chain.invoke(question, config={"callbacks": [usage]})
            counts = usage.usage_metadata[llm.model_name]
            cached = counts["input_token_details"]["cache_read"]
            print(f"\n{question}\n  {counts['input_tokens']} prompt tokens, {cached} of them from the cache")
            for claim in claims:
                print(f"  {claim['text']}\n    “{claim['quote']}” ({claim['source']}, character {claim['start']})")
            if not claims:
                print("  The documents do not hold an answer.")
            answers.append(claims)
    return answers


if __name__ == "__main__":
    main()
