"""Writes the finished model: a Hugging Face float16 directory, and from it the EXL2 one by the project's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from exl2_rag.llm.checkpoint.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.reconstruct import reconstruct
from exl2_rag.llm.checkpoint.writer import write_checkpoint
from exl2_rag.llm.quantize.convert_rtn import ConversionReport, convert_rtn
from exl2_rag.qa.prompt import PROMPT_FORM_VERSION
from tools.demo_model.model import Llama
from tools.demo_model.vocabulary import BOS, END, EOS, write_tokenizer_files


def write_fp16(model: Llama, tokenizer: Tokenizer, directory: Path, *, settings: dict[str, Any]) -> None:
    """A Llama checkpoint as other tools read it, and `exl2_rag.json`: how the model wants to be asked.

    Args:
        settings: fields of `QASettings` for exl2_rag.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": value.detach().to(torch.float16).contiguous() for name, value in model.named_parameters()
    }
    write_checkpoint(directory, tensors, shard_bytes=None)
    bos, end, pad = (int(tokenizer.token_to_id(text)) for text in (BOS, END, EOS))
    _write_json(directory / "config.json", model.shape.hf_config(bos=bos, eos=end, pad=pad))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False},
    )
    write_tokenizer_files(tokenizer, directory)
    _write_json(directory / "exl2_rag.json", {"prompt_form": PROMPT_FORM_VERSION, **settings})


def write_exl2(fp16: Path, directory: Path, *, bits: float, head_bits: int) -> ConversionReport:
    """The EXL2 form of `write_fp16`'s directory."""
    return convert_rtn(fp16, directory, bits=bits, head_bits=head_bits)


def rounded_model(model: Llama, exl2: Path) -> Llama:
    """The model with the weights that its EXL2 form stands for, to see what rounding changes."""
    checkpoint = Checkpoint.open(exl2)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    rounded = Llama(model.shape)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            key = f"model.{name.removesuffix('.weight')}"
            if checkpoint.kind(key) == "exl2":
                parameter.copy_(reconstruct(tensors, key)[:, : parameter.shape[0]].T)
            else:
                parameter.copy_(tensors[f"model.{name}"])
    rounded.output = reconstruct(tensors, "lm_head")[:, : model.shape.vocab_size].T.float()
    return rounded


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
