"""Keys of config.json that do not change what a model computes, and a reader that accounts for every key.

A key that was neither read nor listed here may well change the computation, so a value in it is refused by name: a
wrong text without an error is the worst that a loader can produce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from exl2_rag.errors import UnsupportedModelError

Json = Mapping[str, object]

# fmt: off
HARMLESS_KEYS: Final[frozenset[str]] = frozenset({
    # Where the file comes from, what wrote it, what it may be used with.
    "architectures", "auto_map", "finetuning_task", "is_llama_config", "license", "model_max_length",
    "max_sequence_length", "seq_length", "name_or_path", "problem_type", "task_specific_params", "tokenizer_class",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "id2label", "label2id",
    "num_labels", "prefix",
    # Training only, or how a framework runs it.
    "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "attn_pdrop",
    "chunk_size_feed_forward", "embd_pdrop", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "initializer_range", "output_attentions", "output_hidden_states", "output_past", "output_router_logits",
    "pretraining_tp", "resid_pdrop", "return_dict", "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache",
    "use_flash_attn", "keys_to_ignore_at_inference",
    # Token ids and sampling defaults of old files; sampling is the request's business.
    "sep_token_id", "decoder_start_token_id", "unk_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
})
# fmt: on

_MAX_SIZE = 1 << 31


def is_unset(value: object) -> bool:
    """Whether a value says "not used": null, false, or an empty list, object or string."""
    return value is None or value is False or value in ({}, [], "")


class KeyReader:
    """A JSON object that is read key by key; `refuse_unread` names what nobody read.

    `where` is how error messages call the object, `defaults` what an absent key means.
    """

    def __init__(self, values: Json, *, where: str, defaults: Json | None = None) -> None:
        self._values = values
        self._defaults = defaults or {}
        self._read: set[str] = set()
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self._values.get(key) is not None

    def value(self, key: str, default: object = None) -> object:
        """Whatever stands at `key`; an absent key has the reader's default, then `default`."""
        self._read.add(key)
        if key in self._values:
            return self._values[key]
        return self._defaults.get(key, default)

    def fail(self, key: str, expected: str, found: object) -> UnsupportedModelError:
        """The error for a value that cannot be honoured."""
        return UnsupportedModelError(f"{self.where}: {key} must be {expected}, it is {_shown(found)}")

    def size(self, key: str, *, at_most: int = _MAX_SIZE) -> int:
        """A positive whole number that must be there."""
        value = self.optional_size(key, at_most=at_most)
        if value is None:
            raise UnsupportedModelError(
                f"{self.where}: {key} is missing; a model of this architecture needs it, so the file is incomplete"
            )
        return value

    def optional_size(self, key: str, *, at_most: int = _MAX_SIZE) -> int | None:
        """A positive whole number, or None where the key is null or absent and has no default."""
        value = self.value(key)
        if value is None:
            return None
        number = _number(value)
        if number is None or not number.is_integer() or not 1 <= number <= at_most:
            raise self.fail(key, f"a whole number from 1 to {at_most}", value)
        return int(number)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; a null or absent key has `default`."""
        value = self.value(key)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModelError(f"{self.where}: {key} is missing; it must be a number above 0")
        number = _number(value)
        if number is None or number <= 0:
            raise self.fail(key, "a number above 0", value)
        return number

    def flag(self, key: str) -> bool:
        """True or false; null and absent are false."""
        value = self.value(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.fail(key, "true or false", value)
        return value

    def one_of(self, key: str, choices: Iterable[str], default: str | None) -> str | None:
        """A string out of `choices`; null and absent are `default`."""
        value = self.value(key)
        if value is None:
            return default
        allowed = tuple(choices)
        if not isinstance(value, str) or value not in allowed:
            raise self.fail(key, f"one of {', '.join(allowed)}", value)
        return value

    def section(self, key: str) -> Json | None:
        """A JSON object, or None where it is null, absent or empty."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "a JSON object", value)
        return value or None

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where it is null or absent."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "a list of strings", value)
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; null, absent and the -1 of old files are none."""
        value = self.value(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
        if len(ids) != len(items):
            raise self.fail(key, "a token id, a list of token ids, or null", value)
        return tuple(token_id for token_id in ids if token_id >= 0)

    def refuse_unread(self, harmless: frozenset[str] = frozenset()) -> None:
        """Raise for a key that was not read, is not harmless and is set. A leading underscore marks bookkeeping."""
        for key, value in self._values.items():
            if key not in self._read and key not in harmless and not key.startswith("_") and not is_unset(value):
                raise UnsupportedModelError(
                    f"{self.where}: {key} = {_shown(value)} is not supported, and may change what the model computes; "
                    "if you know that it does not, remove the key from the file"
                )


def _number(value: object) -> float | None:
    """A finite number as float; None for anything else, also for true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
