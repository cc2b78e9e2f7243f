"""A model's config.json, read, checked and turned into numbers. No torch, no tensors.

Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`, `torch_dtype`) and what transformers 5 writes
(`rope_parameters`, `layer_types`, `dtype`). What is not understood is refused by name, never taken for its default.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from exl2_rag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from exl2_rag.llm.config_keys import HARMLESS_KEYS, Json, KeyReader
from exl2_rag.llm.models.architecture import ARCHITECTURES, Architecture, BiasRule

RopeKind = Literal["default", "linear", "llama3"]

_ROPE_KINDS: Final[tuple[RopeKind, ...]] = ("default", "linear", "llama3")
_ACTIVATIONS: Final = ("silu", "swish")  # two names of one function
_DEFAULT_ROPE_THETA: Final = 10000.0
_DEFAULT_NORM_EPS: Final = 1e-6
_MAX_LAYERS: Final = 10_000
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions turn queries and keys.

    Attributes:
        theta: the base; pair i of R/2 turns by theta ** (-2 i / R) radians a token.
        kind: "default"; "linear": all frequencies divided by `factor`; "llama3": the low ones divided, the high ones
            kept, a ramp between them.
        factor: see `kind`; 1 for "default".
        low_freq_factor, high_freq_factor: "llama3" only; where the ramp ends and begins, in turns within
            `original_max_seq_len` tokens.
        original_max_seq_len: "llama3" only; tokens the model was trained on before it was stretched.
    """

    theta: float = _DEFAULT_ROPE_THETA
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model and everything else in config.json that changes what it computes.

    Attributes:
        architecture: one of `exl2_rag.llm.models.architecture.ARCHITECTURES`.
        head_dim: width of one head; need not be hidden_size / n_heads.
        max_seq_len: tokens the model was made for.
        sliding_windows: per layer, how many keys a token sees (itself included); 0 is all of them.
        qkv_bias, o_bias, mlp_bias: whether these matrices have a bias.
        tied_embeddings: the head is the embedding, unless the checkpoint has a head of its own.
        eos_token_ids: all ids that end a text, from config.json and generation_config.json.
        dtype: what config.json calls the dtype of the weights, or None. The tensors know better.
        gptq_format: `checkpoint_format` of a GPTQ model, or None.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    max_seq_len: int
    rope: RopeConfig
    sliding_windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None = None
    gptq_format: str | None = None

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5)

    @classmethod
    def from_dir(cls, model_dir: Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json.

        Raises:
            ModelNotFoundError: no such directory, or no config.json in it.
            ModelError: a file is not a JSON object.
            UnsupportedModelError: see `from_dict`.
        """
        if not model_dir.is_dir():
            raise ModelNotFoundError(f"there is no model directory at {model_dir}; give the path of a directory")
        path = model_dir / "config.json"
        if not path.is_file():
            raise ModelNotFoundError(f"{model_dir} has no config.json; expected the directory of a model")
        generation_path = model_dir / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.is_file() else None
        return cls.from_dict(_read_json(path), generation)

    @classmethod
    def from_dict(cls, config: Json, generation_config: Json | None = None) -> ModelConfig:
        """Check the contents of config.json, and take the token ids of generation_config.json.

        Raises:
            UnsupportedModelError: an unknown architecture, a value that is not honoured or makes no sense, or an
                unknown key with a value in it. The message names the key.
        """
        architecture = _architecture(config)
        keys = KeyReader(config, where="config.json", defaults=architecture.config_defaults)
        keys.one_of("model_type", [architecture.model_type], None)
        keys.one_of("hidden_act", _ACTIVATIONS, "silu")
        hidden_size, n_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        n_layers = keys.size("num_hidden_layers", at_most=_MAX_LAYERS)
        max_seq_len = keys.size("max_position_embeddings")
        bias = {key: keys.flag(key) for key in _bias_keys(architecture)}
        generation = KeyReader(generation_config or {}, where="generation_config.json")
        result = cls(
            architecture=architecture.name,
            vocab_size=keys.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.size("intermediate_size"),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=keys.optional_size("num_key_value_heads") or n_heads,
            head_dim=_head_dim(keys, hidden_size, n_heads),
            norm_eps=keys.positive("rms_norm_eps", _DEFAULT_NORM_EPS),
            max_seq_len=max_seq_len,
            rope=_rope(keys, max_seq_len),
            sliding_windows=_sliding_windows(keys, architecture, n_layers),
            qkv_bias=_has_bias(architecture.qkv_bias, bias.get("attention_bias", False)),
            o_bias=_has_bias(architecture.o_bias, bias.get("attention_bias", False)),
            mlp_bias=_has_bias(architecture.mlp_bias, bias.get("mlp_bias", False)),
            tied_embeddings=keys.flag("tie_word_embeddings"),
            bos_token_id=_one_token_id(keys, generation, "bos_token_id"),
            eos_token_ids=tuple(
                dict.fromkeys((*keys.token_ids("eos_token_id"), *generation.token_ids("eos_token_id")))
            ),
            pad_token_id=_one_token_id(keys, generation, "pad_token_id"),
            dtype=_dtype(keys),
            gptq_format=_gptq_format(keys),
        )
        if result.n_heads % result.n_kv_heads:
            raise UnsupportedModelError(
                f"config.json: num_attention_heads ({result.n_heads}) must be a multiple of num_key_value_heads "
                f"({result.n_kv_heads}); the file contradicts itself"
            )
        keys.refuse_unread(HARMLESS_KEYS)
        return result


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); the file is damaged, fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(content).__name__}; fetch it again")
    return content


def _architecture(config: Json) -> Architecture:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UnsupportedModelError(
            f"config.json: architectures must be a list of one name, it is {names!r:.100}; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the architecture {names[0]!r:.100} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[names[0]]


def _bias_keys(architecture: Architecture) -> list[str]:
    """The bias keys this architecture honours; others are left unread and refused when true."""
    attention = "config" in (architecture.qkv_bias, architecture.o_bias)
    return ["attention_bias"] * attention + ["mlp_bias"] * (architecture.mlp_bias == "config")


def _has_bias(rule: BiasRule, configured: bool) -> bool:
    return configured if rule == "config" else rule == "always"


def _head_dim(keys: KeyReader, hidden_size: int, n_heads: int) -> int:
    head_dim = keys.optional_size("head_dim")
    if head_dim is None:
        if hidden_size % n_heads:
            raise UnsupportedModelError(
                f"config.json: without head_dim, hidden_size ({hidden_size}) must be a multiple of "
                f"num_attention_heads ({n_heads}); the file is incomplete or contradicts itself"
            )
        head_dim = hidden_size // n_heads
    if head_dim % 2:
        raise keys.fail("head_dim", "even, since positions turn numbers in pairs", head_dim)
    return head_dim


def _rope(keys: KeyReader, max_seq_len: int) -> RopeConfig:
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    if old is not None and new is not None and old != new:
        raise UnsupportedModelError(
            f"config.json: rope_scaling ({dict(old)}) and rope_parameters ({dict(new)}) differ; remove the wrong one"
        )
    section = old if new is None else new
    part = KeyReader(section or {}, where=f"config.json: {'rope_scaling' if new is None else 'rope_parameters'}")
    kinds = [part.one_of(key, _ROPE_KINDS, None) for key in ("rope_type", "type")]
    if None not in kinds and kinds[0] != kinds[1]:
        raise part.fail("type", f"the same as rope_type ({kinds[0]})", kinds[1])
    kind = cast(RopeKind, kinds[0] or kinds[1] or "default")
    thetas = [reader.positive("rope_theta") for reader in (keys, part) if reader.has("rope_theta")]
    if len(set(thetas)) > 1:
        raise part.fail("rope_theta", f"that of config.json itself ({thetas[0]})", thetas[1])
    for reader in (keys, part):
        if reader.positive("partial_rotary_factor", 1.0) != 1.0:
            raise reader.fail("partial_rotary_factor", "1 in this architecture", reader.value("partial_rotary_factor"))
    theta = thetas[0] if thetas else _DEFAULT_ROPE_THETA
    original = part.optional_size("original_max_position_embeddings")
    if kind == "default":
        if part.positive("factor", 1.0) != 1.0:
            raise part.fail("factor", "1 where no rope_type is given", part.value("factor"))
        rope = RopeConfig(theta=theta)
    elif kind == "linear":
        rope = RopeConfig(theta=theta, kind=kind, factor=part.positive("factor"))
    else:
        rope = RopeConfig(
            theta=theta,
            kind=kind,
            factor=part.positive("factor"),
            low_freq_factor=part.positive("low_freq_factor"),
            high_freq_factor=part.positive("high_freq_factor"),
            original_max_seq_len=original or max_seq_len,
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise part.fail(
                "high_freq_factor", f"above low_freq_factor ({rope.low_freq_factor})", rope.high_freq_factor
            )
    part.refuse_unread()
    return rope


def _sliding_windows(keys: KeyReader, architecture: Architecture, n_layers: int) -> tuple[int, ...]:
    if architecture.window == "never":
        return (0,) * n_layers
    if architecture.window == "upper layers" and not keys.flag("use_sliding_window"):
        keys.value("sliding_window")  # stands in most files, and means nothing unless use_sliding_window is set
        window = 0
    else:
        window = keys.optional_size("sliding_window") or 0
    layer_types = keys.strings("layer_types")
    if architecture.window == "upper layers":
        first = keys.value("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise keys.fail("max_window_layers", "a whole number from 0 on", first)
        windows = tuple(window if layer >= first else 0 for layer in range(n_layers))
    else:
        windows = (window,) * n_layers
    if layer_types is None:
        return windows
    if len(layer_types) != n_layers or not set(layer_types) <= {_FULL, _SLIDING}:
        raise keys.fail("layer_types", f'{n_layers} times "{_FULL}" or "{_SLIDING}"', list(layer_types))
    if _SLIDING in layer_types and not window:
        raise keys.fail("layer_types", f'"{_FULL}" throughout, since no sliding window is set', list(layer_types))
    typed = tuple(window if layer_type == _SLIDING else 0 for layer_type in layer_types)
    if architecture.window == "all layers" and typed != windows:
        raise keys.fail("layer_types", f'"{_SLIDING}" throughout, as this architecture does', list(layer_types))
    return typed


def _one_token_id(keys: KeyReader, generation: KeyReader, key: str) -> int | None:
    ids = (*keys.token_ids(key), *generation.token_ids(key))
    return ids[0] if ids else None


def _dtype(keys: KeyReader) -> str | None:
    """`dtype` of newer files, else `torch_dtype`."""
    names = [keys.value("dtype"), keys.value("torch_dtype")]
    name = names[1] if names[0] is None else names[0]
    if name is not None and not isinstance(name, str):
        raise keys.fail("dtype", "a string or null", name)
    return name.removeprefix("torch.") if name else None


def _gptq_format(keys: KeyReader) -> str | None:
    """Refuse quantisations other than EXL2 and 4-bit GPTQ; which is which, the tensors say."""
    section = keys.section("quantization_config")
    if section is None:
        return None
    part = KeyReader(section, where="config.json: quantization_config")
    if part.one_of("quant_method", ("exl2", "gptq"), None) != "gptq":
        return None
    if part.optional_size("bits") not in {None, 4}:
        raise part.fail("bits", "4 for GPTQ", part.value("bits"))
    return part.one_of("checkpoint_format", ("gptq", "gptq_v2"), None)
