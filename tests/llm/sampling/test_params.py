from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest

from exl2_rag import SamplingParams
from exl2_rag.errors import RequestError
from exl2_rag.llm.sampling.params import DEFAULT_ORDER
from exl2_rag.llm.sampling.ranges import RANGES


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("value", ["0.5", True, math.nan, math.inf, -math.inf, [1], object()])
def test_what_is_no_finite_number_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("min_temp", -1),
        ("temp_exponent", 0),
        ("smoothing_factor", -0.1),
        ("smoothing_curve", 0.9),
        ("smoothing_curve", 3.1),
        ("top_k", -1),
        ("top_k", 3.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 1.1),
        ("top_a", -0.1),
        ("typical_p", 0),
        ("tfs", 1.5),
        ("epsilon_cutoff", 1),
        ("eta_cutoff", 1),
        ("xtc_probability", 1.1),
        ("xtc_threshold", -0.1),
        ("mirostat_mode", 3),
        ("mirostat_tau", 0),
        ("mirostat_eta", 2),
        ("repetition_penalty", 0),
        ("penalty_range", 0),
        ("penalty_range", -1),
        ("penalty_decay", -1),
        ("dry_multiplier", -1),
        ("dry_base", 0.9),
        ("dry_allowed_length", 0),
        ("dry_range", 0),
        ("no_repeat_ngram_size", -1),
        ("cfg_scale", -1),
        ("logprobs", -1),
        ("logprobs", 1001),
        ("seed", -1),
        ("seed", 2**63),
        ("max_tokens", "many"),
        ("top_p", None),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_range(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be .*, got "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": "end"}, "write stop="),
        ({"stop": ("",)}, "empty string"),
        ({"stop": (3,)}, "stop must hold strings"),
        ({"stop_token_ids": 3}, "tuple of token ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must hold token ids"),
        ({"banned_tokens": (1.5,)}, "banned_tokens must hold token ids"),
        ({"banned_tokens": (True,)}, "banned_tokens must hold token ids"),
        ({"allowed_tokens": ()}, "leaves no token"),
        ({"allowed_tokens": (1, 2), "banned_tokens": (2, 1)}, "leaves no token"),
        ({"logit_bias": [(1, 2.0)]}, "must map token ids"),
        ({"logit_bias": {"a": 2.0}}, "logit_bias must hold token ids"),
        ({"logit_bias": {1: math.inf}}, "finite numbers"),
        ({"logit_bias": {1: "2"}}, "finite numbers"),
        ({"dry_sequence_breakers": "\n"}, "write dry_sequence_breakers="),
        ({"dry_sequence_breakers": ("",)}, "empty string"),
        ({"dry_sequence_breakers": (-4,)}, "token ids"),
        ({"sampler_order": ("top_q",)}, "unknown stage 'top_q'"),
        ({"sampler_order": ("top_k", "top_k")}, "more than once"),
        ({"min_tokens": 5, "max_tokens": 4}, "at most max_tokens"),
        ({"min_temp": 2.0, "max_temp": 1.0}, "at most max_temp"),
        ({"min_temp": 2.0}, "give a max_temp"),
        ({"mirostat_mode": 1}, "mirostat 2.0"),
        ({"negative_prompt": "bad"}, "no effect"),
        ({"negative_prompt": "", "cfg_scale": 2}, "is empty"),
        ({"negative_prompt": 5, "cfg_scale": 2}, "negative_prompt must be"),
        ({"negative_prompt": (1, -2), "cfg_scale": 2}, "negative_prompt must hold token ids"),
        ({"temperature_last": 1}, "must be True or False"),
        ({"ignore_eos": "yes"}, "must be True or False"),
    ],
)
def test_other_mistakes_are_refused_with_what_to_do(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_lists_become_tuples_and_what_was_given_can_change_without_effect() -> None:
    bias = {5: 1}
    banned = [1, 2]
    params = SamplingParams(logit_bias=bias, banned_tokens=banned, stop=["x"])  # type: ignore[arg-type]
    bias[5] = 2
    banned.append(3)
    assert params.logit_bias == {5: 1.0}
    assert params.banned_tokens == (1, 2)
    assert params.stop == ("x",)


def test_equal_parameters_are_equal_hash_alike_and_survive_pickling() -> None:
    one = SamplingParams(logit_bias={1: 2.0}, dry_multiplier=0.8)
    assert hash(one) == hash(replace(one)) == hash(pickle.loads(pickle.dumps(one)))
    assert pickle.loads(pickle.dumps(one)) == one


def test_only_stages_with_something_to_do_run_in_the_usual_order() -> None:
    assert SamplingParams(temperature=1).stages == ()
    assert SamplingParams(temperature=0.5, min_p=0.1, top_k=3).stages == ("temperature", "top_k", "min_p")
    everything = SamplingParams(
        smoothing_factor=0.3, top_k=5, top_p=0.9, top_a=0.1, min_p=0.1, tfs=0.9, typical_p=0.9, epsilon_cutoff=0.1,
        eta_cutoff=0.1, mirostat_mode=2, xtc_probability=0.5,
    )  # fmt: skip
    assert everything.stages == DEFAULT_ORDER


def test_the_order_can_be_changed_and_the_temperature_put_last() -> None:
    params = SamplingParams(top_k=3, min_p=0.1, top_p=0.9, sampler_order=("min_p", "top_p"))
    assert params.stages == ("min_p", "top_p", "temperature", "top_k")
    assert replace(params, temperature_last=True).stages == ("min_p", "top_p", "top_k", "temperature")
