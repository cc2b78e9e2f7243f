"""The golden vectors: what ExLlamaV2's own code reconstructs from each file, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from exl2_rag.llm.checkpoint import pack, reconstruct
from exl2_rag.llm.kernels.weights import parse_groups
from tests.support.golden import EXL2_NAMES, GPTQ_NAMES, PRESCALED_NAMES, QUANTISER_NAMES, golden


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def test_every_golden_layer_is_listed():
    assert (len(EXL2_NAMES), len(GPTQ_NAMES), len(QUANTISER_NAMES), len(PRESCALED_NAMES)) == (16, 3, 2, 2)


@pytest.mark.parametrize("name", EXL2_NAMES + GPTQ_NAMES + QUANTISER_NAMES)
def test_layers_are_reconstructed_bit_for_bit(name):
    layer = golden(name)
    weight = reconstruct(layer.tensors, layer.key, checkpoint_format=layer.checkpoint_format)
    assert torch.equal(bits_of(weight), bits_of(layer.tensors["expected"]))


@pytest.mark.parametrize("name", PRESCALED_NAMES)
def test_a_prescale_enters_the_scales_bit_for_bit(name):
    layer = golden(name)
    weight = reconstruct(layer.tensors, layer.key, prescale=layer.prescale)
    assert torch.equal(bits_of(weight), bits_of(layer.tensors["expected_prescaled"]))


@pytest.mark.parametrize("name", EXL2_NAMES + QUANTISER_NAMES)
def test_packing_the_codes_gives_the_stored_tensors(name):
    layer = golden(name)
    codes = layer.tensors.get("unpacked.q", layer.tensors.get("codes"))
    groups = parse_groups([pair & 0xFFFF for pair in layer.part("q_groups").tolist()], layer.part("q_weight").shape[0])
    scales = layer.tensors.get("unpacked.scale")
    if scales is None:  # the quantiser files hold the packed scales only
        words = layer.part("q_scale")[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)
        scales = (words & 15).flatten(-2) + 1
    packed = pack(
        codes.to(torch.int64),
        scales,
        layer.part("q_scale_max"),
        [(group.bits, group.rows) for group in groups],
        layer.part("q_invperm"),
    )
    for part, tensor in packed.items():
        assert torch.equal(tensor, layer.part(part)), part
        assert tensor.dtype == layer.part(part).dtype, part


def test_the_widths_found_are_those_the_metadata_names():
    layer = golden("mix_8_6_5_4_3_2_random")
    groups = parse_groups([pair & 0xFFFF for pair in layer.part("q_groups").tolist()], layer.part("q_weight").shape[0])
    assert list(dict.fromkeys(group.bits for group in groups)) == json.loads(layer.metadata["bits"])
