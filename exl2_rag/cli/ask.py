"""`exl2-rag ask`: a question to the indexed documents."""

from __future__ import annotations

from typing import Annotated

import typer

from exl2_rag.cli.common import (
    DEFAULT_INDEX,
    IndexOption,
    JsonOption,
    ModelOption,
    SettingsOption,
    busy,
    command,
    open_llm,
    out,
    print_json,
)
from exl2_rag.settings import load_settings


@command
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    model: ModelOption = None,
    index: IndexOption = DEFAULT_INDEX,
    settings: SettingsOption = "default",
    chunks: Annotated[int | None, typer.Option("--chunks", "-k", help="Retrieved chunks put into the prompt.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from the indexed documents, with verified quotes."""
    from exl2_rag.cli.options import answer_settings, make_retriever
    from exl2_rag.qa import DocumentQA
    from exl2_rag.retrieval import DocumentIndex

    loaded = load_settings(settings)
    with DocumentIndex.open(index) as opened, open_llm(model, loaded, quiet=as_json) as llm:
        qa = DocumentQA(llm, make_retriever(opened, loaded), answer_settings(loaded, llm.model_dir, chunks))
        with busy("Reading", quiet=as_json):
            answer = qa.ask(question)
        if as_json:
            print_json(answer)
        else:
            from exl2_rag.cli.answer_view import render_answer

            out.print(render_answer(answer))
