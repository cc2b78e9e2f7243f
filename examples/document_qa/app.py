"""Ask a folder of documents. See README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from exl2_rag import ExL2LLM
from exl2_rag.demo import model_dir
from exl2_rag.qa import Answer, DocumentQA
from exl2_rag.qa.prompt import SYSTEM_TEXT
from exl2_rag.retrieval import DocumentIndex

HERE = Path(__file__).parent


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ask a folder of documents.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "documents")
    parser.add_argument("--model", type=Path, default=None, help="model directory; left out: the demo model")
    parser.add_argument("--index", type=Path, default=Path(".exl2-rag/document-qa"), help="where the index is kept")
    parser.add_argument("--question", action="append", help="ask this and stop; may be repeated")
    return parser.parse_args(arguments)


def show(answer: Answer) -> None:
    """Print one answer."""
    if not answer.answerable:
        print("  The documents do not answer this, as far as the model can tell.")
    for claim in answer.claims:
        place = claim.citation
        page = f", page {place.page}" if place.page is not None else ""
        if claim.text != place.quote:
            print(f"  {claim.text}")
        print(f'    "{place.quote}"')
        print(f"    {place.source}{page}, characters {place.start}-{place.end}")
    print(f"  [{answer.usage.cached_tokens} of {answer.usage.prompt_tokens} prompt tokens were cached]")


def main(arguments: list[str] | None = None) -> list[Answer]:
    """Index the folder and answer; returns the answers."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    answers = []
    with DocumentIndex.create_or_open(options.index) as index:
        report = index.update(options.folder)
        print(f"{report.n_chunks} chunks; {len(report.indexed)} files read, {len(report.unchanged)} unchanged")
        for refusal in report.refused:
            print(f"  not read: {refusal.path}: {refusal.message}")
        with ExL2LLM(options.model or model_dir()) as llm:
            rules = llm.pin([{"role": "system", "content": SYSTEM_TEXT}])
            qa = DocumentQA(llm, index)
            for question in options.question or (line.strip() for line in sys.stdin):
                if not question:
                    continue
                print(question)
                answers.append(qa.ask(question))
                show(answers[-1])
            rules.release()
    return answers


if __name__ == "__main__":
    main()
