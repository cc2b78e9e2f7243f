import math

import pytest
import torch

from exl2_rag.llm.config import RopeConfig
from exl2_rag.llm.layers.rotary import Rotary, inverse_frequencies

CPU = torch.device("cpu")

ROPES = {
    "default": (RopeConfig(1e4), {"rope_type": "default", "rope_theta": 1e4}),
    "large theta": (RopeConfig(1e6), {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (RopeConfig(1e4, "linear", 3.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama3": (
        RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_tables_are_those_of_transformers_up_to_far_positions(name: str, head_dim: int) -> None:
    """Frequencies agree to the last bit or nearly; a float64 frequency would be 1e-3 off at the last position."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, parameters = ROPES[name]
    settings = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    positions = torch.tensor([0, 1, 2, 17, 4095, 8193, 65537, 131071])
    cos, sin = LlamaRotaryEmbedding(settings)(torch.zeros(1), positions[None])
    ours = Rotary(rope, rotary_dim=head_dim, max_seq_len=131072, device=CPU)
    for table, theirs in ((ours.cos, cos), (ours.sin, sin)):
        assert table.shape == (131072, head_dim // 2)
        torch.testing.assert_close(table[positions], theirs[0, :, : head_dim // 2], rtol=0, atol=1e-5)


def test_llama3_keeps_fast_pairs_slows_slow_ones_and_ramps_between() -> None:
    plain = inverse_frequencies(RopeConfig(1e4), 64)
    bent = inverse_frequencies(RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 256), 64)
    turns = 256 * plain / (2 * math.pi)
    kept, slowed = turns > 4, turns < 1
    between = ~kept & ~slowed
    assert kept.any()
    assert slowed.any()
    assert between.any()
    assert torch.equal(bent[kept], plain[kept])
    assert torch.equal(bent[slowed], plain[slowed] / 8)
    assert bool(((bent[between] < plain[between]) & (bent[between] > plain[between] / 8)).all())


def test_position_0_turns_nothing() -> None:
    rotary = Rotary(RopeConfig(), rotary_dim=32, max_seq_len=3, device=CPU)
    assert torch.equal(rotary.cos[0], torch.ones(16))
    assert torch.equal(rotary.sin[0], torch.zeros(16))
