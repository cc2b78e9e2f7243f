"""Trains a small Llama on English text, to measure quantisation on a model that has really learnt something.

    python benchmarks/small_lm.py DIRECTORY [--text FILE …] [--minutes 30] [--threads 2] [--seed 0]

Five million parameters (256 wide, 6 layers, byte-level BPE of 4,096 tokens, untied head), trained from random weights
for so many minutes of wall-clock time with AdamW and a cosine schedule, and saved as float16 safetensors. What it
writes is not good; its weights and activations have the structure that random ones lack. The text is SQuAD's training
paragraphs; WikiText-2, on which the converter is judged, is not in it.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SQUAD = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "squad" / "train-v1.1.json.xz"
VOCAB, LENGTH, BATCH = 4096, 256, 8
PEAK_RATE, WARM_UP_SHARE = 2e-3, 0.03
BOS, EOS = "<s>", "</s>"


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a SQuAD file, or those of a text file, divided by empty lines."""
    content = path.read_bytes()
    text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    if path.name.endswith((".json", ".json.xz")):
        return [part["context"] for article in json.loads(text)["data"] for part in article["paragraphs"]]
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def train_tokenizer(texts: list[str], directory: Path) -> Tokenizer:
    """A byte-level BPE tokenizer with BOS and EOS, saved as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def batches(ids: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """[BATCH, LENGTH] windows of the text, drawn at random."""
    while True:
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH)]


def train(ids: Tensor, minutes: float, seed: int) -> tuple[LlamaForCausalLM, list[tuple[float, float]]]:
    """The model, and (minutes, mean loss since the last entry) as it went."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    start, shown, losses, curve = time.perf_counter(), 0.0, [], []
    for batch in batches(ids, generator):
        share = (time.perf_counter() - start) / (60 * minutes)
        if share >= 1:
            break
        rate = PEAK_RATE * min(share / WARM_UP_SHARE, 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if share - shown > 0.02:
            shown = share
            curve.append((round(share * minutes, 2), round(sum(losses) / len(losses), 4)))
            print(
                f"{curve[-1][0]:6.2f} min  loss {curve[-1][1]:.3f}  ({len(losses)} steps)", file=sys.stderr, flush=True
            )
            losses = []
    return model, curve


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("directory", type=Path, help="where the model goes; must not exist")
    parser.add_argument("--text", type=Path, nargs="+", default=[SQUAD])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.directory.mkdir(parents=True)
    texts = [text for path in args.text for text in paragraphs(path)]
    tokenizer = train_tokenizer(texts, args.directory)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = torch.tensor([token for one in encoded for token in (0, *one.ids, 1)])
    model, curve = train(ids, args.minutes, args.seed)
    model.to(torch.float16).save_pretrained(args.directory)
    record = {"tokens": len(ids), "minutes": args.minutes, "seed": args.seed, "loss": curve}
    (args.directory / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
