"""Continue a prompt, watch it stream, and see what a shared prefix saves.

    python examples/generate.py [MODEL_DIR]

Without a model directory the demo model is used. It was trained to quote short passages and nothing else, so do not
expect sense from free text; give any EXL2 model you have.
"""

from __future__ import annotations

import sys

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.demo import model_dir

PROMPT = "The paged KV cache keeps the keys and values of a prompt. When the next prompt begins with the same words,"


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with ExL2LLM(arguments[0] if arguments else model_dir()) as llm:
        print(f"model: {llm.model_name}")

        result = llm.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0))
        print(f"greedy: {result.text!r}")
        print(f"  {result.usage.prompt_tokens} prompt tokens, {result.usage.cached_tokens} from the cache")

        again = llm.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0))
        print(f"again:  the same text: {again.text == result.text}")
        print(f"  {again.usage.prompt_tokens} prompt tokens, {again.usage.cached_tokens} from the cache")

        print("sampled, with a seed: ", end="")
        for piece in llm.stream(PROMPT, SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=7)):
            print(piece.text, end="", flush=True)
        print()

        batch = llm.generate([PROMPT, PROMPT + " the", "Once upon a time"], SamplingParams(max_tokens=8, temperature=0))
        for one in batch:
            print(f"batch:  {one.text!r} ({one.usage.cached_tokens} cached)")


if __name__ == "__main__":
    main()
