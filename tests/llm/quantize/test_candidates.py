"""Layouts of a block, and the choice of one per block within a budget."""

from __future__ import annotations

import itertools

import pytest

from exl2_rag.errors import SettingsError
from exl2_rag.llm.quantize.candidates import (
    HEAD_PLANS,
    BlockOption,
    MatrixSize,
    attention_options,
    choose_options,
    mlp_options,
)
from exl2_rag.llm.quantize.rtn import QuantisationPlan

ATTENTION = (
    MatrixSize("self_attn.q_proj", 1024, 1024),
    MatrixSize("self_attn.k_proj", 1024, 256),
    MatrixSize("self_attn.v_proj", 1024, 256),
    MatrixSize("self_attn.o_proj", 1024, 1024),
)
MLP = (
    MatrixSize("mlp.gate_proj", 1024, 2816),
    MatrixSize("mlp.up_proj", 1024, 2816),
    MatrixSize("mlp.down_proj", 2816, 1024),
)


def option(total_bits: int, error: float) -> BlockOption:
    return BlockOption((), total_bits, error)


def test_the_tables_have_the_rows_of_the_converter():
    attention, mlp = attention_options(*ATTENTION), mlp_options(*MLP)
    assert (len(attention), len(mlp)) == (19, 17)
    assert all(len(one.plans) == 4 for one in attention)
    assert all(one.plans[0] == one.plans[1] for one in attention), "q and k are always laid out alike"
    assert all(len(one.plans) == 3 for one in mlp)
    assert HEAD_PLANS[6] == QuantisationPlan((8, 6), (0.15, 0.85), (128, 128))


@pytest.mark.parametrize("options", [attention_options(*ATTENTION), mlp_options(*MLP)])
def test_options_come_cheapest_first_and_count_every_matrix(options):
    assert all(a.total_bits <= b.total_bits for a, b in itertools.pairwise(options))
    elements = 1024 * (1024 + 256 + 256 + 1024) if len(options) == 19 else 3 * 1024 * 2816
    assert 2.0 < options[0].total_bits / elements < 2.7
    assert 8.0 < options[-1].total_bits / elements < 8.3
    assert options[-1].error < options[0].error / 100


def test_the_choice_keeps_to_the_budget_and_leaves_little():
    blocks = [attention_options(*ATTENTION), mlp_options(*MLP)] * 8
    sensitivities = [1.0 + index % 5 for index in range(len(blocks))]
    elements = 8 * (1024 * (1024 + 256 + 256 + 1024) + 3 * 1024 * 2816)
    for bits in (2.5, 3.0, 4.5, 6.0, 7.9):
        chosen = choose_options(blocks, sensitivities, int(bits * elements))
        spent = sum(one.total_bits for one in chosen) / elements
        assert 0.98 * bits < spent <= bits


def test_the_choice_is_the_best_one_where_all_can_be_tried():
    blocks = [[option(2, 9.0), option(3, 4.0), option(5, 1.0)] for _ in range(4)]
    sensitivities = [1.0, 2.0, 4.0, 8.0]

    def loss(choice):
        return sum(weight * one.error for weight, one in zip(sensitivities, choice, strict=True))

    for budget in (8, 14, 17, 20):
        chosen = choose_options(blocks, sensitivities, budget)
        fitting = [c for c in itertools.product(*blocks) if sum(one.total_bits for one in c) <= budget]
        assert loss(chosen) <= min(map(loss, fitting)) + 2.0  # a price per bit misses what lies between two prices
        assert sum(one.total_bits for one in chosen) <= budget


def test_a_budget_below_the_cheapest_layouts_is_refused():
    with pytest.raises(SettingsError, match=r"smallest layouts take 4 bits, only 3"):
        choose_options([[option(2, 1.0)], [option(2, 1.0)]], [1.0, 1.0], 3)


def test_the_budget_is_spent_even_where_errors_are_huge():
    chosen = choose_options([[option(2, 1e60), option(4, 1e59)]], [1.0], 3)
    assert [one.total_bits for one in chosen] == [2]
