"""Sampling on the card: against the reference, against the sampler of the engine, and alone against in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl2_rag.llm import sampler
from exl2_rag.llm.kernels import cuda_sampling, reference_sampling
from exl2_rag.llm.kernels.sampling_params import RowSampling
from exl2_rag.llm.request import SamplingParams
from tests.cuda_emulation import EmulatedBackend
from tests.llm.kernels.cuda.conftest import place_of
from tests.llm.kernels.samples import normal

# Sizes, and the share of tokens that a mask allows (1: no mask).
ROWS = [(1, 1.0), (2, 1.0), (3, 0.4), (31, 0.4), (32, 0.01), (33, 1.0), (129, 0.4), (1500, 1.0), (5000, 0.7)]

# temperature, top_k, top_p, min_p
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (0.7, 40, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.3, 0.0),
    (1.3, 0, 1.0, 0.05),
    (0.8, 50, 0.95, 0.02),
    (2.0, 1200, 0.99, 0.001),
    (5.0, 0, 0.98, 0.0),
    (1e-9, 0, 0.5, 0.0),
    (1e-60, 3, 0.5, 0.1),
    (1e6, 0, 0.7, 0.0),
]


def params(settings: list[tuple[float, int, float, float]], *, seed: int = 0) -> RowSampling:
    temperatures, top_k, top_p, min_p = zip(*settings, strict=True)
    batch = len(settings)
    return RowSampling(
        torch.tensor(temperatures, dtype=torch.float64),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
        torch.arange(batch) * 7919 + seed,
        torch.arange(batch) % 5,
    )


def sample(backend, logits, mask, rows: RowSampling, **options):
    """On the backend's device and back."""
    device = place_of(backend)
    on_device = RowSampling(*(getattr(rows, name).to(device) for name in RowSampling.__slots__))
    mask = None if mask is None else mask.to(device)
    results = cuda_sampling.sample(backend, logits.to(device), mask, on_device, **options)
    return tuple(None if one is None else one.cpu() for one in results)


def pack_mask(allowed: torch.Tensor) -> torch.Tensor:
    words = -(-allowed.shape[1] // 32)
    padded = torch.zeros(allowed.shape[0], words * 32, dtype=torch.int64)
    padded[:, : allowed.shape[1]] = allowed
    packed = (padded.view(-1, words, 32) << torch.arange(32)).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def random_mask(batch: int, vocab_size: int, share: float, *, seed: int = 0) -> torch.Tensor:
    allowed = torch.rand(batch, vocab_size, generator=torch.Generator().manual_seed(seed)) < share
    allowed[:, seed % vocab_size] = True
    return allowed


@pytest.mark.parametrize(("vocab_size", "share"), ROWS)
def test_tokens_are_those_of_the_reference(backend, vocab_size, share):
    logits = normal(len(SETTINGS), vocab_size, seed=vocab_size) * 3
    mask = None if share == 1 else pack_mask(random_mask(len(SETTINGS), vocab_size, share))
    rows = params(SETTINGS, seed=vocab_size)
    tokens, log_probs = sample(backend, logits, mask, rows, log_probs=True)
    wanted, wanted_log_probs = reference_sampling.sample(logits, mask, rows)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(log_probs, wanted_log_probs, atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_sampler_of_the_engine():
    for vocab_size in (3, 129, 1500):
        logits = normal(len(SETTINGS), vocab_size, seed=1) * 3
        allowed = random_mask(len(SETTINGS), vocab_size, 0.6)
        rows = params(SETTINGS)
        draws = [
            sampler.Draw(
                SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
                int(rows.seeds[row]),
                int(rows.steps[row]),
                allowed[row].numpy(),
            )
            for row, (temperature, top_k, top_p, min_p) in enumerate(SETTINGS)
        ]
        tokens, _ = reference_sampling.sample(logits, pack_mask(allowed), rows)
        assert tokens.tolist() == sampler.sample(logits, draws)


def test_many_draws_are_those_of_the_reference(backend):
    for setting in ((0.9, 30, 0.9, 0.01), (1.0, 0, 0.95, 0.0), (1.5, 0, 1.0, 0.03)):
        logits = (normal(1, 2000, seed=4) * 2).expand(16, -1)
        rows = params([setting] * 16)
        tokens, _ = sample(backend, logits, None, rows)
        wanted, _ = reference_sampling.sample(logits, None, rows)
        assert torch.equal(tokens, wanted)
        assert len(set(tokens.tolist())) > 5


def test_uniform_numbers_are_numpys(backend):
    # Two tokens of equal weight: the token says whether the number is below one half; many seeds say it well enough.
    seeds = [0, 1, 2**31, 2**63 - 1, 12345678901234567]
    steps = [0, 1, 2, 2**40]
    pairs = [(seed, step) for seed in seeds for step in steps] * 2
    rows = params([(1.0, 0, 1.0, 0.0)] * len(pairs))
    for index, (seed, step) in enumerate(pairs):
        rows.seeds[index], rows.steps[index] = seed, step + index // 20
    tokens, _ = sample(backend, torch.zeros(len(pairs), 64), None, rows)
    for index, token in enumerate(tokens.tolist()):
        assert token == int(sampler.uniform(int(rows.seeds[index]), int(rows.steps[index])) * 64)


@pytest.mark.parametrize("vocab_size", [33, 1500])
def test_equal_logits_keep_the_lowest_ids(backend, vocab_size):
    logits = torch.zeros(5, vocab_size)
    logits[1, 20:] = -0.0
    logits[2] = torch.arange(vocab_size) % 3
    rows = params(
        [(0.0, 0, 1.0, 0.0), (1.0, 0, 0.1, 0.0), (1.0, 0, 0.2, 0.0), (1.0, 2, 1.0, 0.0), (3.0, 0, 0.999, 0.5)]
    )
    for seed in range(2):
        rows.seeds.fill_(seed)
        tokens, _ = sample(backend, logits, None, rows)
        wanted, _ = reference_sampling.sample(logits, None, rows)
        assert torch.equal(tokens, wanted)
    assert tokens[0] == 0


def test_rows_without_a_token_and_rows_of_no_numbers_say_so(backend):
    logits = normal(6, 50)
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    logits[3, 7] = -torch.tensor(float("nan"))
    logits[4, 7] = float("inf")
    allowed = torch.ones(6, 50, dtype=torch.bool)
    allowed[5] = False
    for setting in ((0.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.1)):
        tokens, log_probs = sample(backend, logits, pack_mask(allowed), params([setting] * 6), log_probs=True)
        assert tokens[0] >= 0
        assert tokens[1:].tolist() == [-1] * 5
        assert log_probs[1:].isnan().all()
    allowed[1] = True
    allowed[1, 7] = False  # what is masked out may hold anything
    tokens, _ = sample(backend, logits, pack_mask(allowed), params([setting] * 6))
    assert tokens[1] >= 0


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_a_row_draws_the_same_alone_and_in_any_batch_and_order(order):
    settings = [SETTINGS[index] for index in (0, 1, 4, 7)]
    wide = normal(len(settings), 1333, seed=9) * 2
    logits = wide[:, 5:1305]
    mask = pack_mask(random_mask(len(settings), 1300, 0.8))
    rows = params(settings)
    together, _ = sample(EmulatedBackend(80), logits, mask, rows)
    for row in range(len(settings)):
        part = RowSampling(*(getattr(rows, name)[row : row + 1] for name in RowSampling.__slots__))
        backend = EmulatedBackend(80, order=order)
        alone, _ = sample(backend, logits[row : row + 1].clone(), mask[row : row + 1], part)
        assert torch.equal(alone, together[row : row + 1])


def test_draws_follow_the_distribution(backend):
    weights = np.array([0.5, 0.25, 0.125, 0.125])
    logits = torch.tensor(np.log(weights), dtype=torch.float32).expand(400, -1)
    tokens, _ = sample(backend, logits, None, params([(1.0, 0, 1.0, 0.0)] * 400))
    counts = np.bincount(tokens.numpy(), minlength=4) / 400
    assert np.abs(counts - weights).max() < 0.08
