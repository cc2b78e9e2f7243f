"""The card's benchmark at toy sizes on the emulation: that it runs to its end and its table holds what was measured."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_model import Shape, SpeedModel, groups_for
from tests.cuda_emulation import EmulatedBackend

TINY = Shape(hidden=128, intermediate=256, layers=1, heads=2, kv_heads=1, vocab=101)


@pytest.fixture
def machine() -> gpu.Machine:
    return gpu.Machine(EmulatedBackend(90), torch.device("cpu"), on_card=False)


def test_everything_is_measured_and_shown(machine):
    result = {
        "card": "emulation",
        "driver": "none",
        "copy_gb_s": gpu.copy_bandwidth(machine, 1 << 20) / 1e9,
        "products": gpu.packed_products(machine, (4,), (1, 9), (128, 256), 1e9),
        "attention": gpu.attention(machine, (1,), 64, 1e9),
        "models": {
            "tiny": gpu.measure_model(
                machine, "tiny", TINY, 4.0, 1e9, batches=(1, 2), prefills=(40,), prefix=64, context=20, n_new=7
            )
        },
    }
    model = result["models"]["tiny"]
    assert [one["batch"] for one in model["decode"]] == [1, 2]
    assert all(one["tok_s"] > 0 for one in model["decode"])
    assert model["prefill"][0]["tokens"] == 40
    assert model["first_token"]["warm_ms"] > 0
    model["exllamav2"] = {"decode": [{"batch": 2, "tok_s": 1.0}]}
    shown = gpu.table(json.loads(json.dumps(result)))
    assert "tiny decode, batch 2" in shown
    assert shown.count("x ExLlamaV2") == 1
    model["exllamav2"] = {"skipped": "no module named exllamav2"}
    assert "ExLlamaV2 was not measured: no module named exllamav2" in gpu.table(result)


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.5, 4.0, 4.5, 6.0, 8.0])
def test_the_layout_comes_to_the_bits_asked_for(bits):
    runs = groups_for(4096, bits)
    assert sum(rows for _, rows in runs) == 4096
    assert math.isclose(sum(width * rows for width, rows in runs) / 4096, bits, abs_tol=0.01)


def test_weights_of_a_model_keep_activations_at_about_their_size(machine):
    model = SpeedModel(TINY, 4.0, machine.backend, machine.device)
    x = torch.randn((4, 128)).half()
    (product,) = model._linears[1](x)
    assert 0.1 < product.float().std() < 10
    assert 4.0 < model.bits_per_weight < 6.0
