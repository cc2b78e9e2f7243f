"""What the package exports: `__all__` agrees with what is there, and importing it is quick and light."""

import importlib
import json
import subprocess
import sys

import pytest

PUBLIC_MODULES = ["exl2_rag", "exl2_rag.retrieval", "exl2_rag.qa", "exl2_rag.llm.checkpoint"]
HEAVY = ["torch", "transformers", "langchain_core", "llama_index", "chromadb", "sentence_transformers", "numpy"]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_exported_name_exists_and_none_is_listed_twice(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__, f"{name} exports nothing"
    assert len(set(module.__all__)) == len(module.__all__)
    for exported in module.__all__:
        assert getattr(module, exported) is not None


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_dir_lists_what_is_exported(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) <= set(dir(module))


def test_an_unknown_name_is_an_attribute_error() -> None:
    module = importlib.import_module("exl2_rag")
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = module.NoSuchThing


def test_importing_the_package_loads_neither_torch_nor_a_framework() -> None:
    code = f"import json, sys, exl2_rag; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == []
