"""Stream JSON that obeys a schema, whatever the model would have said.

    python examples/stream_json.py [MODEL_DIR]

The schema is enforced while decoding: a token that would break it cannot be drawn. The demo model fills the fields
with nonsense; a capable model fills them with sense. The form is right in both cases.
"""

from __future__ import annotations

import json
import sys

from exl2_rag import ExL2LLM, JsonSchema, SamplingParams
from exl2_rag.demo import model_dir

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 16},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "population", "continent", "capital"],
    "additionalProperties": False,
}


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run the example; returns the parsed object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with ExL2LLM(arguments[0] if arguments else model_dir()) as llm:
        text = ""
        for piece in llm.stream_chat(
            [{"role": "user", "content": "Describe Warsaw."}],
            SamplingParams(max_tokens=128, temperature=0),
            constraint=JsonSchema(SCHEMA),
        ):
            text += piece.text
            print(piece.text, end="", flush=True)
        print()
    value: dict[str, object] = json.loads(text)
    print(f"parsed: {value}")
    return value


if __name__ == "__main__":
    main()
