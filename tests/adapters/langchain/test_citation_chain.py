"""`citation_chain`: questions in, verified answers out, as a LangChain runnable over a real engine and index."""

from __future__ import annotations

from exl2_rag import ExL2LLM
from exl2_rag.adapters.langchain import citation_chain
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval.index import DocumentIndex

SETTINGS = QASettings(k=2, quote_unit="sentence", max_claims=2, max_text_chars=20, max_tokens=200)
# A model of random weights answers some and declines others.
QUESTIONS = ["What is a page?", "Do cats sleep?", "Who?", "How many metres?", "Is it tail first?", "When?", "Why so?"]


async def test_answers_quote_the_documents_on_every_way(llm: ExL2LLM, document_index: DocumentIndex) -> None:
    chain = citation_chain(llm.as_langchain(), document_index, SETTINGS)
    invoked = [chain.invoke(question) for question in QUESTIONS]
    batched = chain.batch(QUESTIONS)
    awaited = [await chain.ainvoke(question) for question in QUESTIONS]
    assert [answer.raw for answer in batched] == [answer.raw for answer in invoked]
    assert [answer.raw for answer in awaited] == [answer.raw for answer in invoked]
    claims = [claim for answer in invoked for claim in answer.claims]
    assert claims
    for claim in claims:
        text = document_index.document_text(claim.citation.source)
        assert text[claim.citation.start : claim.citation.end] == claim.citation.quote
    for answer in awaited:
        assert answer.usage.cached_tokens >= answer.usage.prompt_tokens - 1
