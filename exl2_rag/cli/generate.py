"""`exl2-rag generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exl2_rag.cli.common import JsonOption, ModelOption, SettingsOption, command, err, open_llm, print_json
from exl2_rag.errors import ConstraintError
from exl2_rag.settings import load_settings

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import JsonSchema
    from exl2_rag.llm.request import SamplingParams
    from exl2_rag.settings import SamplingSettings


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads standard input.")],
    model: ModelOption = None,
    settings: SettingsOption = "default",
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None,
    schema: Annotated[Path | None, typer.Option(help="JSON Schema file that the output must obey.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with a model."""
    loaded = load_settings(settings)
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = sampling_params(loaded.sampling, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
    constraint = _schema_constraint(schema) if schema else None
    with open_llm(model, loaded, quiet=as_json) as llm:
        if as_json:
            print_json(llm.generate(text, sampling, constraint=constraint))
            return
        for piece in llm.stream(text, sampling, constraint=constraint):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            if piece.usage is not None and piece.timings is not None:
                rate = piece.usage.completion_tokens / max(piece.timings.total_s - piece.timings.first_token_s, 1e-9)
                note = f"{piece.usage.completion_tokens} tokens, {rate:.0f} tokens/s, ended by {piece.finish_reason}"
                sys.stdout.write("\n")
                err.print(note, style="dim")


def sampling_params(
    settings: SamplingSettings,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    stop: list[str] | None = None,
) -> SamplingParams:
    """Sampling from the settings file, with the options given on the command line on top."""
    from exl2_rag.llm.request import SamplingParams

    values = settings.model_dump()
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    values.update({name: value for name, value in given.items() if value is not None})
    return SamplingParams(**values, stop=tuple(stop or ()))


def _schema_constraint(path: Path) -> JsonSchema:
    from exl2_rag.llm.constraint import JsonSchema

    try:
        return JsonSchema(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConstraintError(f"expected a JSON Schema file at {path}: {error}") from error
