from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exl2_rag.errors import RequestError
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.fingerprint import ROOT_BYTES, CacheIdentity, root_key
from exl2_rag.llm.page_table import KEY_BYTES
from tests.support.synthetic import make_model_dir

ENGINE = EngineConfig(max_seq_len=64, n_pages=8, page_size=32, max_batch_size=2, cache_dtype="fp16", precision="fast")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_model_dir(tmp_path / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path / "cache"))


def identity(model_dir: Path, *, hash_weights: bool = False, **changes: object) -> CacheIdentity:
    config = dataclasses.replace(ENGINE, **changes)  # type: ignore[arg-type]
    return CacheIdentity.of(model_dir, ModelConfig.from_dir(model_dir), config, hash_weights=hash_weights)


def test_the_same_model_and_settings_have_the_same_identity(model_dir: Path, tmp_path: Path) -> None:
    copy = make_model_dir(tmp_path / "elsewhere")
    assert identity(model_dir).digest() == identity(copy).digest()
    assert identity(model_dir, hash_weights=True).digest() == identity(copy, hash_weights=True).digest()
    assert identity(model_dir, max_batch_size=7, n_pages=100).digest() == identity(model_dir).digest()


@pytest.mark.parametrize(
    "change",
    [{"cache_dtype": "fp32"}, {"cache_dtype": "q8"}, {"page_size": 64}, {"precision": "exact"}, {"device": "cuda:0"}],
)
def test_what_changes_the_numbers_of_a_page_counts(model_dir: Path, change: dict[str, object]) -> None:
    assert identity(model_dir, **change).digest() != identity(model_dir).digest()


def test_determinism_counts_on_a_card_where_it_chooses_other_kernels(model_dir: Path) -> None:
    assert identity(model_dir, deterministic=True).digest() == identity(model_dir).digest()
    on_card = identity(model_dir, device="cuda:0").digest()
    assert identity(model_dir, device="cuda:0", deterministic=True).digest() != on_card


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 20000.0), ("rms_norm_eps", 1e-3), ("quantization_config", {"bits": 4.5, "quant_method": "exl2"})],
)
def test_a_changed_config_counts_and_is_named(model_dir: Path, key: str, value: object) -> None:
    before = identity(model_dir)
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    after = identity(model_dir)
    assert after.digest() != before.digest()
    (named,) = after.differences(before.as_dict())
    assert named.partition(":")[0] in {"model.rope", "model.norm_eps", "quantisation"}


def test_the_ids_that_end_a_text_do_not_count(model_dir: Path) -> None:
    before = identity(model_dir)
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert identity(model_dir).digest() == before.digest()


def test_another_tokenizer_counts(model_dir: Path) -> None:
    before = identity(model_dir)
    path = model_dir / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert identity(model_dir).differences(before.as_dict())[0].startswith("tokenizer:")


def test_another_tensor_file_counts(model_dir: Path, tmp_path: Path) -> None:
    other = make_model_dir(tmp_path / "other", layers=3)
    (other / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    assert identity(other).digest() != identity(model_dir).digest()


def test_one_changed_number_among_the_weights_counts_where_a_cache_outlives_the_process(model_dir: Path) -> None:
    before = identity(model_dir, hash_weights=True)
    path = next(model_dir.glob("*.safetensors"))
    tensors = load_file(path)
    next(reversed(tensors.values())).view(-1)[5] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert identity(model_dir, hash_weights=True).weights != before.weights


def test_an_identity_survives_json(model_dir: Path) -> None:
    one = identity(model_dir, cache_dtype="q8")
    again = CacheIdentity(**json.loads(json.dumps(one.as_dict())))
    assert again == one
    assert again.digest() == one.digest()
    assert one.differences(again.as_dict()) == []
    assert one.cache_group == 32


def test_a_root_depends_on_the_tenant_the_adapters_and_the_images(model_dir: Path) -> None:
    base = identity(model_dir)
    roots = [
        root_key(base),
        root_key(base, salt="a"),
        root_key(base, salt="b"),
        root_key(base, lora=[("x", 1.0)]),
        root_key(base, lora=[("x", 0.5)]),
        root_key(base, lora=[("x", 1.0), ("y", 1.0)]),
        root_key(base, images=["x"]),
        root_key(base, images=["x", "y"]),
        root_key(base, images=["y", "x"]),
        root_key(identity(model_dir, page_size=64)),
    ]
    assert len(set(roots)) == len(roots)
    assert {len(root) for root in roots} == {ROOT_BYTES}
    assert ROOT_BYTES > KEY_BYTES
    assert root_key(base, lora=[("x", 1), ("y", 2)]) == root_key(base.digest(), lora=[("y", 2.0), ("x", 1.0)])


@pytest.mark.parametrize("salt", ["", b"bytes", 7])
def test_a_salt_that_is_no_text_is_refused(salt: object) -> None:
    with pytest.raises(RequestError, match="cache_salt must be a text"):
        root_key(b"", salt=salt)  # type: ignore[arg-type]
