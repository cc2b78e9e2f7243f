"""The demo model's own byte-level BPE vocabulary and chat template.

Trained on the SQuAD training text and on the prompt form. The pre-tokenizer keeps the fixed pieces of a reply
(`,"claims":[{"source":"` and so on) whole, so that they cost one token each, and keeps the quotation mark apart from
the punctuation before it, so that a sentence has the same tokens in a document and inside the JSON of a reply.
Knows nothing of the model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from exl2_rag.qa.prompt import DECLINED, SYSTEM_TEXT, answer_json, document_block, question_block

BOS, EOS, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_PIECES = (
    # What a reply is made of besides the model's own decisions.
    r'\{"answerable":|,"claims":\[\{"source":"|,"claims":\[\]\}|","quote":"|","text":"|"\},\{"source":"|"\}\]\}',
    # The header of a block.
    r"<<[0-9a-f]{8}(?= )| question>>\n",
    # An escape inside JSON, a quotation mark and a backslash each stand alone.
    r' ?\\["\\/bfnrtu]| ?"|\\',
    # Words, numbers of up to four digits (a year is one piece), punctuation, white space.
    r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}[\p{L}\p{M}]*| ?\p{N}{1,4}",
    r' ?[^\s\p{L}\p{N}"\\]+',
    r"\s+(?!\S)|\s+",
)


def random_delimiter(rng: random.Random) -> str:
    """Eight hexadecimal digits, as an index makes them."""
    return f"{rng.getrandbits(32):08x}"


def train_vocabulary(texts: Sequence[str], replies: Sequence[tuple[str, str, str]], *, size: int) -> Tokenizer:
    """A vocabulary of `size` tokens.

    Args:
        texts: passages and questions.
        replies: (question, quote, text) of replies; their form is learnt besides their words.
        size: number of tokens, the special ones included; they get the ids from 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(_PIECES)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(texts, replies), trainer)
    return tokenizer


def _corpus(texts: Sequence[str], replies: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    rng = random.Random(0)
    yield from texts
    for question, quote, text in replies:
        label = f"d{rng.randint(1, 999)}"
        yield document_block(random_delimiter(rng), label, "", "")
        yield question_block(random_delimiter(rng), question)
        yield answer_json([(label, quote, text), (label, "", text)] if rng.random() < 0.1 else [(label, quote, text)])
        yield DECLINED
    for _ in range(2000):
        yield SYSTEM_TEXT


def write_tokenizer_files(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with the chat template)."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": EOS,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
