from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.layers.embedding import load_embedding
from exl2_rag.llm.layers.norm import load_norm

CPU = torch.device("cpu")


def checkpoint_of(name: str, tensor: Tensor, path: Path) -> Checkpoint:
    save_file({name: tensor}, path / "model.safetensors")
    return Checkpoint.open(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_table_stays_as_stored_and_rows_come_out_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    table = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    checkpoint = checkpoint_of("embed.weight", table, tmp_path)
    embedding = load_embedding(checkpoint, "embed", vocab_size=7, hidden_size=4, device=CPU)
    rows = embedding(torch.tensor([6, 0, 6]))
    assert embedding.weight.dtype == dtype
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table.float()[[6, 0, 6]])


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("embed.weight", torch.zeros(7, 4), tmp_path)
    with pytest.raises(CheckpointError, match=r"embed\.weight.*\[8, 4\].*\[7, 4\]"):
        load_embedding(checkpoint, "embed", vocab_size=8, hidden_size=4, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_divides_by_the_root_mean_square_and_multiplies_by_its_weight(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = (1 + 0.2 * torch.randn(8, generator=torch.Generator().manual_seed(1))).to(dtype)
    norm = load_norm(checkpoint_of("norm.weight", weight, tmp_path), "norm", width=8, eps=1e-2, device=CPU)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * weight.float()
    torch.testing.assert_close(norm(x), expected)
    assert norm.weight.dtype == torch.float32


def test_a_norm_of_another_width_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("norm.weight", torch.ones(8), tmp_path)
    with pytest.raises(CheckpointError, match=r"norm\.weight.*\[9\].*\[8\]"):
        load_norm(checkpoint, "norm", width=9, eps=1e-5, device=CPU)
