"""A small, really trained model tells the story its author published."""

from pathlib import Path

import pytest
import torch

from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from tests.llm.models import parity
from tests.support.shared_data import shared_path

PROMPT = "Once upon a time"
PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\""
)
NEW_TOKENS = 200
PAGE_SIZE = 32


@pytest.fixture
def model_dir() -> Path:
    return shared_path("data/stories260k/hf")


def _tell(model_dir: Path, prompt: list[int], n_tokens: int, dtype: torch.dtype) -> list[int]:
    """Greedy continuation: the prompt in two slices, then token by token."""
    config = ModelConfig.from_dir(model_dir)
    decoder = parity.load_model(
        model_dir, config, parity.Checkpoint.open(model_dir), device=parity.CPU, max_seq_len=config.max_seq_len
    )
    pages = torch.arange(config.max_seq_len // PAGE_SIZE).flip(0)
    cache = KVCache(
        n_layers=config.n_layers, n_pages=len(pages), page_size=PAGE_SIZE, n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim, dtype=dtype, device=parity.CPU,
    )  # fmt: skip
    tokens, done = list(prompt), 0
    ends = [2, *range(len(prompt), len(prompt) + n_tokens)]
    for end in ends:
        inputs = ForwardInputs.single(torch.tensor(tokens[done:end]), start=done, pages=pages, page_size=PAGE_SIZE)
        logits = decoder.forward(inputs, cache)
        done = end
        if end >= len(prompt):
            tokens.append(int(logits[-1].argmax()))
    return tokens


@pytest.mark.shared
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16], ids=["float32 cache", "float16 cache"])
def test_the_greedy_story_is_the_published_one(model_dir: Path, cache_dtype: torch.dtype) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    tokens = _tell(model_dir, prompt, NEW_TOKENS, cache_dtype)
    assert tokenizer.decode(tokens).startswith(PUBLISHED)


@pytest.mark.shared
def test_the_greedy_story_is_that_of_transformers(model_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    prompt = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(PROMPT).ids
    oracle = transformers.LlamaForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
    theirs = oracle.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert _tell(model_dir, prompt, NEW_TOKENS, torch.float32) == theirs[0].tolist()
