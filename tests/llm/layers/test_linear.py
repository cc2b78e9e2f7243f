from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint, reconstruct
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.linear import DenseLinear, LinearSpec, QuantisedLinear, check_linear, load_linear
from tests.support.golden import EXL2_NAMES, GPTQ_NAMES, golden
from tests.support.synthetic import random_exl2_tensors

CPU = torch.device("cpu")


def checkpoint_of(tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*EXL2_NAMES, *GPTQ_NAMES])
def test_golden_layers_multiply_like_their_exact_weights(name: str, tmp_path: Path) -> None:
    layer = golden(name)
    tensors = {key: value for key, value in layer.tensors.items() if key.startswith(layer.key + ".")}
    width, has_bias = int(layer.metadata["out_features"]), f"{layer.key}.bias" in tensors
    weight = layer.tensors["expected"].float()
    spec = LinearSpec(layer.key, weight.shape[0], width, bias=has_bias)
    linear = load_linear(checkpoint_of(tensors, tmp_path), spec, device=CPU, gptq_format=layer.checkpoint_format)
    x = normal(5, weight.shape[0])
    expected = x @ weight[:, :width]
    if has_bias:
        expected = expected + layer.part("bias")[:width].float()
    assert isinstance(linear, QuantisedLinear)
    torch.testing.assert_close(linear(Activations(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_plain_weights_stay_in_their_dtype_and_are_computed_in_float32(
    dtype: torch.dtype, has_bias: bool, tmp_path: Path
) -> None:
    tensors = {"fc.weight": normal(13, 24).to(dtype)} | ({"fc.bias": normal(13, seed=1).to(dtype)} if has_bias else {})
    linear = load_linear(checkpoint_of(tensors, tmp_path), LinearSpec("fc", 24, 13, has_bias), device=CPU)
    x = normal(3, 24, seed=2)
    bias = tensors["fc.bias"].float() if has_bias else None
    assert isinstance(linear, DenseLinear)
    assert linear.weight.dtype == dtype
    assert linear.weight_bytes == 13 * 24 * dtype.itemsize + 13 * 4 * has_bias
    torch.testing.assert_close(
        linear(Activations(x)), torch.nn.functional.linear(x, tensors["fc.weight"].float(), bias)
    )


def test_padded_columns_never_leave_the_layer(tmp_path: Path) -> None:
    tensors = random_exl2_tensors("fc", 64, 70, torch.Generator().manual_seed(4))
    tensors["fc.bias"] = normal(96).half()
    linear = load_linear(checkpoint_of(tensors, tmp_path), LinearSpec("fc", 64, 70, bias=True), device=CPU)
    x = normal(2, 64)
    expected = (x @ reconstruct(tensors, "fc").float() + tensors["fc.bias"].float())[:, :70]
    assert linear(Activations(x)).shape == (2, 70)
    torch.testing.assert_close(linear(Activations(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 70), (64, 96 + 1), (64, 64)])
def test_an_exl2_layer_of_another_size_is_refused(inputs: int, outputs: int, tmp_path: Path) -> None:
    tensors = random_exl2_tensors("fc", 64, 70, torch.Generator().manual_seed(4))
    checkpoint = checkpoint_of(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"fc\.q_(weight|invperm)"):
        check_linear(checkpoint, LinearSpec("fc", inputs, outputs))


def test_a_bias_of_the_unpadded_width_is_refused(tmp_path: Path) -> None:
    tensors = random_exl2_tensors("fc", 64, 70, torch.Generator().manual_seed(4))
    checkpoint = checkpoint_of(tensors | {"fc.bias": torch.zeros(70)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"fc\.bias.*\[96\].*\[70\]"):
        load_linear(checkpoint, LinearSpec("fc", 64, 70, bias=True), device=CPU)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_gptq_may_have_a_bias_where_none_belongs_if_it_is_zero(value: float, tmp_path: Path) -> None:
    layer = golden("gptq4_g128")
    tensors = {key: value for key, value in layer.tensors.items() if key.startswith(layer.key + ".")}
    inputs, outputs = layer.tensors["expected"].shape
    checkpoint = checkpoint_of(tensors | {f"{layer.key}.bias": torch.full((outputs,), value).half()}, tmp_path)
    spec = LinearSpec(layer.key, inputs, outputs)
    if value:
        with pytest.raises(CheckpointError, match="no bias there"):
            check_linear(checkpoint, spec)
    else:
        assert f"{layer.key}.bias" in check_linear(checkpoint, spec)


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = checkpoint_of({"other.weight": torch.zeros(2, 2)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"'fc'.*4 inputs and 8 outputs"):
        check_linear(checkpoint, LinearSpec("fc", 4, 8))
