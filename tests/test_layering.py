"""Imports go one way: adapters, cli -> qa -> llm, retrieval; inside llm from the API down to the kernels."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "exl2_rag"

# What each part may import of the package. The longest matching prefix of a module's name decides.
SHARED = ("exl2_rag.errors",)
ALLOWED: dict[str, tuple[str, ...]] = {
    "exl2_rag": ("exl2_rag",),
    "exl2_rag.errors": (),
    "exl2_rag.settings": SHARED,
    "exl2_rag.demo": SHARED,
    "exl2_rag.llm": (*SHARED, "exl2_rag.llm"),
    "exl2_rag.llm.kernels": (*SHARED, "exl2_rag.llm.kernels"),
    "exl2_rag.llm.checkpoint": (*SHARED, "exl2_rag.llm.checkpoint", "exl2_rag.llm.config", "exl2_rag.llm.kernels"),
    "exl2_rag.llm.layers": (
        *SHARED, "exl2_rag.llm.layers", "exl2_rag.llm.kernels", "exl2_rag.llm.checkpoint", "exl2_rag.llm.config",
        "exl2_rag.llm.kv_cache", "exl2_rag.llm.forward_inputs",
    ),
    "exl2_rag.llm.models": (
        *SHARED, "exl2_rag.llm.models", "exl2_rag.llm.layers", "exl2_rag.llm.kernels", "exl2_rag.llm.checkpoint",
        "exl2_rag.llm.config", "exl2_rag.llm.kv_cache", "exl2_rag.llm.forward_inputs",
    ),
    "exl2_rag.llm.page_table": (*SHARED, "exl2_rag.llm.evicted_pages"),
    "exl2_rag.llm.evicted_pages": (),
    "exl2_rag.llm.prefix_trace": ("exl2_rag.llm.page_table",),
    "exl2_rag.llm.kv_store": (
        *SHARED, "exl2_rag.llm.kv_store", "exl2_rag.llm.page_table", "exl2_rag.llm.sequence",
    ),
    "exl2_rag.llm.request": (
        *SHARED, "exl2_rag.llm.constraint", "exl2_rag.llm.logprobs", "exl2_rag.llm.sampling.params",
        "exl2_rag.llm.prompt_report",
    ),
    "exl2_rag.llm.sampling.params": (*SHARED, "exl2_rag.llm.sampling.ranges"),
    "exl2_rag.llm.sampling": (*SHARED, "exl2_rag.llm.sampling", "exl2_rag.llm.logprobs"),
    "exl2_rag.llm.scheduler": (
        *SHARED, "exl2_rag.llm.page_table", "exl2_rag.llm.sequence", "exl2_rag.llm.request",
        "exl2_rag.llm.engine_config", "exl2_rag.llm.step_times", "exl2_rag.llm.pin_book", "exl2_rag.llm.prefix_trace",
    ),
    "exl2_rag.llm.pin_book": (*SHARED, "exl2_rag.llm.page_table", "exl2_rag.llm.sequence", "exl2_rag.llm.request"),
    "exl2_rag.llm.quantize": (
        *SHARED, "exl2_rag.llm.quantize", "exl2_rag.llm.models", "exl2_rag.llm.layers", "exl2_rag.llm.kernels",
        "exl2_rag.llm.checkpoint", "exl2_rag.llm.config", "exl2_rag.llm.forward_inputs", "exl2_rag.llm.tokenizer",
        "exl2_rag.llm.weights_digest",
    ),
    "exl2_rag.llm.step_times": SHARED,
    "exl2_rag.retrieval": (*SHARED, "exl2_rag.retrieval"),
    "exl2_rag.qa": (*SHARED, "exl2_rag.qa", "exl2_rag.llm", "exl2_rag.retrieval"),
    "exl2_rag.adapters": (
        *SHARED, "exl2_rag", "exl2_rag.adapters", "exl2_rag.qa", "exl2_rag.llm", "exl2_rag.retrieval",
    ),
    "exl2_rag.cli": ("exl2_rag",),
}  # fmt: skip
# The one exception, written down: these import their adapter inside the function.
EXCEPTIONS = {("exl2_rag.llm.api", "exl2_rag.adapters")}
NO_TORCH = (
    "exl2_rag.llm.kv_store.tiers", "exl2_rag.llm.kv_store.disk_store", "exl2_rag.llm.kv_store.store_index",
    "exl2_rag.llm.kv_store.segment", "exl2_rag.llm.kv_store.ram_tier",
    "exl2_rag.llm.page_table", "exl2_rag.llm.scheduler", "exl2_rag.llm.request", "exl2_rag.llm.logprobs",
    "exl2_rag.llm.step_times",
    "exl2_rag.llm.sampling.params", "exl2_rag.llm.sampling.ranges", "exl2_rag.retrieval.fusion",
    "exl2_rag.llm.speculation.speculator", "exl2_rag.llm.speculation.prompt_lookup",
)  # fmt: skip
FRAMEWORKS = {"langchain_core": "exl2_rag.adapters.langchain", "llama_index": "exl2_rag.adapters.llama_index"}
# Opens the doors to both, and says which package is missing where one is.
DOORS = "exl2_rag.adapters"


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module, lazy ones too, those for type checking alone excepted."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{a.name}" if node.module == "exl2_rag" else node.module) for a in node.names)


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def violations(name: str, tree: ast.Module) -> list[str]:
    part = max((part for part in ALLOWED if within(name, part)), key=len)
    allowed = ALLOWED[part]
    found = []
    for imported in imports(tree):
        if not within(imported, "exl2_rag") or imported == name:
            continue
        if any(name == source and within(imported, target) for source, target in EXCEPTIONS):
            continue
        if not any(within(imported, target) for target in allowed):
            found.append(f"{name} imports {imported}")
    found += [
        f"{name} imports {imported}, which belongs in {home}"
        for imported in imports(tree)
        for framework, home in FRAMEWORKS.items()
        if within(imported, framework) and not within(name, home) and name != DOORS
    ]
    if name in NO_TORCH:
        found += [f"{name} imports torch" for imported in imports(tree) if within(imported, "torch")]
    return found


def test_no_module_imports_upward() -> None:
    found = [problem for name, tree in modules() for problem in violations(name, tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("exl2_rag.llm.kernels.ops", "from exl2_rag.llm.engine import Engine"),
        ("exl2_rag.llm.engine", "import exl2_rag.retrieval.chunking"),
        ("exl2_rag.retrieval.index", "def late():\n    from exl2_rag.llm.api import ExL2LLM"),
        ("exl2_rag.qa.pipeline", "from exl2_rag.adapters.langchain import ChatExL2"),
        ("exl2_rag.qa.pipeline", "from langchain_core.messages import AIMessage"),
        ("exl2_rag.llm.scheduler", "import torch"),
    ],
)
def test_the_check_itself_catches_an_upward_import(module: str, source: str) -> None:
    assert violations(module, ast.parse(source))


def test_type_checking_imports_are_not_counted() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from exl2_rag.llm.engine import Engine"
    assert not violations("exl2_rag.llm.kernels.ops", ast.parse(source))
