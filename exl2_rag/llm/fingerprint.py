"""What roots the page keys: everything besides the tokens that keys and values depend on.

Two caches of one identity hold the same numbers for the same tokens. A sequence's root adds what belongs to the
request: the tenant's salt, the LoRA set, the images. Pages of different roots are never shared, in memory or on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2_rag.errors import RequestError, SettingsError
from exl2_rag.llm.weights_digest import header_digest, weights_digest

if TYPE_CHECKING:
    from exl2_rag.llm.config import ModelConfig
    from exl2_rag.llm.engine_config import EngineConfig

FORMAT_VERSION = 2
"""Of the numbers in a page: raised when a kernel or a layout changes what lies there for the same tokens."""

ROOT_BYTES = 32
"""Length of a root; page keys are shorter, so the two can never be taken for each other."""

# They say where a text begins and ends, not what is computed for its tokens.
_CONFIG_WITHOUT_EFFECT = {"bos_token_id", "eos_token_ids", "pad_token_id", "dtype"}


@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """Everything that the contents of a KV cache depend on beside tokens and requests, in clear.

    Attributes:
        weights: digest of the tensor files, as `weights_digest` or `header_digest` gives it; its prefix says which.
        quantisation: the quantisation section of config.json as JSON, "" without one.
        model: every value of config.json that changes what is computed: layers, heads, RoPE, windows, biases, …
        tokenizer: sha256 of tokenizer.json. A store could not say otherwise which texts it holds.
        cache_dtype: "fp32", "fp16", "bf16", "q8", …
        cache_group: numbers that share a scale in a quantised cache, else 0.
        cache_rotation: how vectors are turned before they are quantised, "" if they are not.
        page_size: tokens on a page.
        precision: of the matmuls, "exact" or "fast"; on a card with "+deterministic" behind it where that is on.
        device: "cpu" or "cuda"; the same precision means other numbers on each.
        format_version: see `FORMAT_VERSION`.
    """

    weights: str
    quantisation: str
    model: Mapping[str, Any]
    tokenizer: str
    cache_dtype: str
    cache_group: int
    cache_rotation: str
    page_size: int
    precision: str
    device: str
    format_version: int = field(default=FORMAT_VERSION)

    @classmethod
    def of(
        cls, model_dir: Path, config: ModelConfig, engine_config: EngineConfig, *, hash_weights: bool = False
    ) -> CacheIdentity:
        """The identity of the cache that an engine would have.

        Args:
            hash_weights: take a digest of all bytes of the weights instead of the files' headers. A cache that dies
                with its process needs none, as there is one copy of the weights; one that outlives it does.

        Raises:
            CheckpointError: a tensor file cannot be read.
        """
        from exl2_rag.llm.engine_config import QUANT_GROUP, QUANTISED_CACHE_BITS

        values = dataclasses.asdict(config)
        # On a card the option chooses other kernels, whose last bits differ; on the CPU there is nothing to choose.
        on_card_deterministic = "+deterministic" * (engine_config.deterministic and engine_config.device != "cpu")
        is_quantised = engine_config.cache_dtype in QUANTISED_CACHE_BITS
        return cls(
            weights=weights_digest(model_dir) if hash_weights else header_digest(model_dir),
            quantisation=_quantisation(model_dir),
            model=json.loads(json.dumps({k: v for k, v in values.items() if k not in _CONFIG_WITHOUT_EFFECT})),
            tokenizer=_file_digest(model_dir / "tokenizer.json"),
            cache_dtype=engine_config.cache_dtype,
            cache_group=QUANT_GROUP if is_quantised else 0,
            cache_rotation="hadamard" if is_quantised else "",
            page_size=engine_config.page_size,
            precision=engine_config.precision + on_card_deterministic,
            device=engine_config.device.partition(":")[0],
        )

    def as_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}

    def digest(self) -> bytes:
        """32 bytes that name this identity."""
        text = json.dumps(self.as_dict(), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return _hash(b"exl2-rag cache identity", text.encode())

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The fields in which `other`, an `as_dict()`, differs, as "cache_dtype: 'fp16', there 'q8'"."""
        mine, its = _flat(self.as_dict()), _flat(other)
        return [
            f"{name}: {mine.get(name)!r}, there {its.get(name)!r}"
            for name in {**mine, **its}
            if mine.get(name) != its.get(name)
        ]


def root_key(
    identity: CacheIdentity | bytes,
    *,
    salt: str | None = None,
    lora: Iterable[tuple[str, float]] = (),
    images: Iterable[str] = (),
) -> bytes:
    """The root under which a request's pages hang: 32 bytes.

    Args:
        identity: of the cache, or its `digest()`.
        salt: the tenant; requests of one salt share pages, those of different ones never do. None is a tenant, too.
        lora: (digest of the adapter's files, scale) of each adapter at work; their order does not count.
        images: digests of the images' contents, in the order in which they stand in the prompt.

    Raises:
        RequestError: the salt is not a non-empty text.
    """
    check_salt(salt)
    digest = identity.digest() if isinstance(identity, CacheIdentity) else identity
    adapters = sorted((name, float(scale).hex()) for name, scale in lora)
    return _hash(
        b"exl2-rag cache root",
        digest,
        b"" if salt is None else b"salt:" + salt.encode("utf-8", "surrogatepass"),
        json.dumps(adapters).encode(),
        json.dumps(list(images)).encode(),
    )


def check_salt(salt: object) -> None:
    """Refuse what is no salt.

    Raises:
        RequestError: it is neither None nor a non-empty text.
    """
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(
            f"cache_salt must be a text of at least one character, or None for the cache that all unsalted requests "
            f"share, got {salt!r:.80}"
        )


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    model = fields.get("model")
    nested = {f"model.{name}": value for name, value in model.items()} if isinstance(model, Mapping) else {}
    return {**{name: value for name, value in fields.items() if name != "model"}, **nested}


def _quantisation(model_dir: Path) -> str:
    path = model_dir / "config.json"
    if not path.is_file():
        return ""
    try:
        section = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{path} cannot be read as a JSON object ({error}); fetch the model again") from error
    return json.dumps(section, sort_keys=True) if section else ""


def _file_digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else ""


def _hash(*fields: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=ROOT_BYTES)
    for one in fields:
        digest.update(len(one).to_bytes(8, "little"))  # so that no two lists of fields read the same
        digest.update(one)
    return digest.digest()
