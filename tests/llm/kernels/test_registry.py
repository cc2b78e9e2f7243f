"""The ops as torch operators: schemas that tell the truth, and fakes that know the shapes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exl2_rag.llm.kernels import ops, reference, registry
from tests.llm.kernels.samples import MIXES, attention_case, exl2_weights, gptq_weights, normal
from tests.llm.kernels.test_small_ops import rope_case


def arguments_of(name: str) -> tuple[object, ...]:
    if name == "exl2_matmul":
        w = exl2_weights(MIXES["all"], 64)
        return (normal(3, w.in_features), w.codes, w.scales, w.group_scales, w.groups, w.perm)
    if name == "gptq_matmul":
        g = gptq_weights(64, 32, 2)
        return (normal(3, 64), g.codes, g.scales, g.zeros, g.row_groups)
    if name == "rope_cache_write":
        return tuple(rope_case(5).values())
    if name == "paged_attention":
        return (*attention_case([(5, 20), (1, 2)]).arguments(), 0.2, 0)
    return {
        "dense_matmul": (normal(3, 8), normal(5, 8)),
        "rms_norm": (normal(3, 8), normal(8), 1e-5),
        "silu_mul": (normal(3, 8), normal(3, 8)),
    }[name]


@pytest.mark.parametrize("name", ops.TOLERANCES)
def test_schema_and_fake_agree_with_what_the_op_does(name):
    operator = getattr(registry, name)
    torch.library.opcheck(operator, arguments_of(name), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ops.TOLERANCES)
def test_every_op_has_its_namesakes(name):
    assert callable(getattr(ops, name))
    assert callable(getattr(reference, name))


def test_an_op_on_fake_tensors_computes_nothing():
    with FakeTensorMode():
        assert ops.dense_matmul(torch.empty(7, 1 << 20), torch.empty(1 << 20, 1 << 20)).shape == (7, 1 << 20)
