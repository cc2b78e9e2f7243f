"""Windows score every token once; texts are read as they are, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2_rag.errors import SettingsError
from exl2_rag.llm.evaluation.corpus import read_texts
from exl2_rag.llm.evaluation.windows import Window, sliding_windows

BOS = 10_000


@given(n_tokens=st.integers(0, 60), length=st.integers(2, 20), data=st.data(), bos=st.sampled_from([None, BOS]))
def test_each_token_that_has_something_before_it_is_scored_once(
    n_tokens: int, length: int, data: st.DataObject, bos: int | None
) -> None:
    stride = data.draw(st.integers(1, length))
    windows = list(sliding_windows(range(n_tokens), length, stride, bos=bos))
    scored = [token for window in windows for token in window.token_ids[window.first_scored :]]
    assert len(scored) == len(set(scored)) == sum(window.n_scored for window in windows)
    assert all(len(window.token_ids) <= length and window.first_scored >= 1 for window in windows)
    assert all(bos is None or window.token_ids[0] == BOS for window in windows)
    if bos is not None or stride < length:
        assert sorted(scored) == list(range(0 if bos is not None else 1, n_tokens))
    else:
        assert sorted(scored) == [token for token in range(n_tokens) if token % length]
    for window in windows:
        tail = window.token_ids[1 if bos is not None else 0 :]
        assert list(tail) == list(range(tail[0], tail[0] + len(tail)))


def test_windows_are_those_of_the_picture() -> None:
    assert list(sliding_windows(range(10), 6, 3)) == [
        Window((0, 1, 2, 3, 4, 5), 1),
        Window((3, 4, 5, 6, 7, 8), 3),
        Window((6, 7, 8, 9), 3),
    ]


@pytest.mark.parametrize(("length", "stride", "message"), [(1, 1, "length"), (8, 0, "stride"), (8, 9, "stride")])
def test_sizes_that_make_no_windows_are_refused(length: int, stride: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        list(sliding_windows(range(10), length, stride))


def test_files_json_lines_and_folders_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "skip.bin").write_bytes(b"\xff")
    lines = tmp_path / "deep" / "rows.jsonl"
    lines.parent.mkdir()
    lines.write_text('{"text": "one", "id": 3}\n\n"two"\n')
    assert [one.text for one in read_texts([tmp_path])] == ["first", "second", "one\n\ntwo"]
    assert [one.name for one in read_texts([tmp_path / "b.txt", lines])] == [str(tmp_path / "b.txt"), str(lines)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2: expected an object"),
        ("a.jsonl", b"{", "line 1: no valid JSON"),
        ("a.bin", b"x", "holds no .txt"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read_texts([tmp_path])
    with pytest.raises(SettingsError, match="no file or folder"):
        read_texts([tmp_path / "nowhere"])
    with pytest.raises(SettingsError, match="at least one"):
        read_texts([])
