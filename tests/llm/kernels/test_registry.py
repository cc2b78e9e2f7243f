"""The ops as torch operators: schemas that tell the truth, and fakes that know the shapes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exl2_rag.llm.kernels import ops, reference, reference_planes
from exl2_rag.llm.kernels.paged_batch import flatten
from tests.llm.kernels.samples import (
    MIXES,
    attention_call,
    attention_case,
    exl2_weights,
    generator,
    gptq_weights,
    normal,
    plane_weights,
    write_arguments,
)
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
        q, k_pages, v_pages, batch, scoring = attention_call(*attention_case([(5, 20), (1, 2)]).arguments())
        return (q, k_pages, v_pages, None, None, *flatten(batch, scoring))
    if name == "quantise_kv_write":
        *inputs, keys, values = write_arguments(3, bits=6, head_dim=32, rotary=16)
        return (*inputs, keys.codes, keys.scales, values.codes, values.scales)
    if name == "plane_matmul":
        p = plane_weights(MIXES["all"], 64)
        made = ops.digits(normal(3, p.in_features), p.perm)
        numbers = (made.digits, made.scales, made.sums)
        return (normal(3, 64), *numbers, p.planes, p.scales, p.group_scales, p.zeros, p.groups, normal(64), True)
    return {
        "digits": (normal(3, 64), torch.randperm(64, generator=generator(0)).to(torch.int32)),
        "embedding": (normal(5, 8), torch.tensor([4, 0, 4])),
        "add_into": (normal(3, 8), normal(3, 8)),
        "dense_matmul": (normal(3, 5), normal(3, 8), normal(5, 8), None, False),
        "rms_norm": (normal(3, 8), normal(8), 1e-5),
        "silu_mul": (normal(3, 8), normal(3, 8)),
        "silu_mul_into": (normal(3, 8), normal(3, 8)),
    }[name]


@pytest.mark.parametrize("name", ops.TOLERANCES)
def test_schema_and_fake_agree_with_what_the_op_does(name):
    operator = getattr(torch.ops.exl2_rag, name).default
    torch.library.opcheck(operator, arguments_of(name), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ops.TOLERANCES)
def test_every_op_has_its_namesakes(name):
    assert callable(getattr(ops, name))
    assert callable(getattr(reference, name, None) or getattr(reference_planes, name))


def test_an_op_on_fake_tensors_computes_nothing():
    with FakeTensorMode():
        assert ops.dense_matmul(torch.empty(7, 1 << 20), torch.empty(1 << 20, 1 << 20)).shape == (7, 1 << 20)
