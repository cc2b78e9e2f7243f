"""`exl2-rag chat`: talk with a model on the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from exl2_rag.cli.common import ModelOption, SettingsOption, command, err, open_llm
from exl2_rag.cli.generate import sampling_params
from exl2_rag.errors import RequestError
from exl2_rag.settings import load_settings

HELP = "Commands: /new forgets the conversation, /quit ends it. Ctrl-C stops an answer."


@command
def chat(
    model: ModelOption = None,
    settings: SettingsOption = "default",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
) -> None:
    """Talk with a model; earlier turns stay in the KV cache."""
    loaded = load_settings(settings)
    sampling = sampling_params(loaded.sampling, max_tokens=max_tokens, temperature=temperature, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    with open_llm(model, loaded) as llm:
        err.print(HELP, style="dim")
        messages = list(opening)
        while (line := _read_line()) is not None:
            if line == "/quit":
                break
            if line == "/new":
                messages = list(opening)
                continue
            turn = [*messages, {"role": "user", "content": line}]
            answer = ""
            try:
                for piece in llm.stream_chat(turn, sampling):
                    answer += piece.text
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                    if piece.usage is not None:
                        usage = piece.usage
                        note = f"  [{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens from the cache]"
            except KeyboardInterrupt:
                note = "  [stopped]"
            except RequestError as error:
                err.print(f"error: {error}", style="red", markup=False)
                continue
            sys.stdout.write("\n")
            err.print(note, style="dim", markup=False)
            messages = [*turn, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """The next non-empty line, None at the end of input."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()
