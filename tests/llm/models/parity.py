"""Randomised transformers models as the oracle, and a decoder driven in the ways an engine drives it.

Not a test module. Every parameter of the oracle is overwritten: at initialisation norms are all 1, biases all 0 and
logits nearly flat, which hides most mistakes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl2_rag.llm.checkpoint import Checkpoint, reconstruct
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.models.decoder import Decoder
from exl2_rag.llm.models.registry import load_model

CPU = torch.device("cpu")
PAGE_SIZE = 16
TOLERANCE = 1e-4

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_oracle(architecture: str, **config: Any) -> Any:
    """A randomised transformers model, float32, eager attention; `config` replaces or adds to `SMALL`."""
    import transformers

    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    settings = config_class(**SMALL | config, attn_implementation="eager")
    model = getattr(transformers, architecture)(settings).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_((0.2 if name.endswith("bias") else 0.15) * noise)
    return model


def save_oracle(model: Any, path: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Write the model's files as transformers does, and round its own weights to what was written.

    Through a copy: `model.to(float16)` would also round the rotary frequencies, which no file holds.
    """
    copy.deepcopy(model).to(dtype).save_pretrained(path, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def twin_of_quantised(model_dir: Path, checkpoint_format: str | None = None) -> Any:
    """A transformers model that holds the exact weights of an EXL2 or GPTQ model, dequantised."""
    import transformers

    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config["tie_word_embeddings"] = False  # a quantised head is its own matrix
    architecture = config["architectures"][0]
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    settings = config_class.from_dict(config | {"attn_implementation": "eager"})
    settings._attn_implementation = "eager"
    model = getattr(transformers, architecture)(settings).float().eval()
    checkpoint = Checkpoint.open(model_dir)
    stored = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    weights = {}
    for name, target in model.state_dict().items():
        key = name.removesuffix(".weight")
        value = stored[name] if name in stored else reconstruct(stored, key, checkpoint_format=checkpoint_format).T
        weights[name] = value[: target.shape[0]].float()
    model.load_state_dict(weights, strict=True)
    return model


def oracle_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """[T, V] of one sequence, computed at once."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def load(model_dir: Path, config: ModelConfig | None = None) -> Decoder:
    """Our decoder for a model directory; `config` in place of the directory's own."""
    config = config or ModelConfig.from_dir(model_dir)
    return load_model(model_dir, config, Checkpoint.open(model_dir), device=CPU, max_seq_len=128)


@dataclass
class Slice:
    """New tokens of one sequence and where they start in it."""

    sequence: int
    start: int
    token_ids: Sequence[int]


class Runner:
    """A decoder with a cache of its own, whose pages are handed out in a shuffled order."""

    def __init__(self, decoder: Decoder, *, n_sequences: int = 1, dtype: torch.dtype = torch.float32) -> None:
        config = decoder.config
        self.decoder = decoder
        pages_each = decoder.max_seq_len // PAGE_SIZE
        self.cache = KVCache(
            n_layers=config.n_layers,
            n_pages=n_sequences * pages_each,
            page_size=PAGE_SIZE,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=CPU,
        )
        order = torch.randperm(n_sequences * pages_each, generator=torch.Generator().manual_seed(3))
        self.page_table = order.to(torch.int32).view(n_sequences, pages_each)

    def step(self, slices: Sequence[Slice], logit_rows: Iterable[int] | None = None) -> Tensor:
        """One forward pass over all slices; logits of all rows, or of `logit_rows`."""
        positions = torch.cat([torch.arange(s.start, s.start + len(s.token_ids)) for s in slices])
        tables = torch.cat([self.page_table[s.sequence].repeat(len(s.token_ids), 1) for s in slices]).to(torch.int64)
        pages = tables.gather(1, (positions // PAGE_SIZE)[:, None])[:, 0]
        counts = torch.tensor([0, *(len(s.token_ids) for s in slices)])
        rows = range(len(positions)) if logit_rows is None else logit_rows
        inputs = ForwardInputs(
            token_ids=torch.tensor([token for s in slices for token in s.token_ids]),
            positions=positions,
            slot_mapping=pages * PAGE_SIZE + positions % PAGE_SIZE,
            page_table=self.page_table[[s.sequence for s in slices]],
            query_starts=counts.cumsum(0).to(torch.int32),
            context_lens=torch.tensor([s.start + len(s.token_ids) for s in slices], dtype=torch.int32),
            logit_rows=torch.tensor(list(rows), dtype=torch.int64),
        )
        return self.decoder.forward(inputs, self.cache)


def in_slices(decoder: Decoder, token_ids: Sequence[int], lengths: Iterable[int]) -> Tensor:
    """[T, V] of one sequence, computed in slices of these lengths."""
    runner, parts, start = Runner(decoder), [], 0
    for length in lengths:
        parts.append(runner.step([Slice(0, start, token_ids[start : start + length])]))
        start += length
    assert start == len(token_ids)
    return torch.cat(parts)


def random_tokens(n_tokens: int, seed: int, vocab_size: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (n_tokens,), generator=generator).tolist()


def max_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return float((ours - theirs).abs().max())
