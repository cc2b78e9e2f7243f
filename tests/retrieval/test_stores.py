"""Both stores behave alike: nearest first, filters, replacing, deleting, surviving a restart."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exl2_rag.errors import IndexLockedError, RetrievalError
from exl2_rag.retrieval.chroma_store import ChromaStore
from exl2_rag.retrieval.exact_store import FILE_NAME, ExactStore
from exl2_rag.retrieval.store import VectorStore

DIMENSION = 8
Opener = Callable[[], VectorStore]


def unit(seed: int, n: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=["exact", "chroma"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    if request.param == "exact":
        return lambda: ExactStore(tmp_path, dimension=DIMENSION)
    return lambda: ChromaStore(tmp_path / "chroma", dimension=DIMENSION)


def filled(opener: Opener, n: int = 20) -> VectorStore:
    store = opener()
    metadata = [{"source": "even" if i % 2 == 0 else "odd", "n": i} for i in range(n)]
    store.upsert([f"c{i}" for i in range(n)], unit(0, n), metadata)
    return store


def test_the_nearest_come_first_with_their_cosine(opener: Opener) -> None:
    store = filled(opener)
    vectors = unit(0, 20)
    expected = vectors @ vectors[3]
    found = store.query(vectors[3], 5)
    assert [identifier for identifier, _ in found] == [f"c{i}" for i in np.argsort(-expected)[:5]]
    assert np.allclose([score for _, score in found], np.sort(expected)[::-1][:5], atol=1e-5)
    store.close()


def test_a_filter_keeps_only_matching_metadata(opener: Opener) -> None:
    store = filled(opener)
    found = store.query(unit(0, 20)[3], 20, where={"source": "even"})
    assert {identifier for identifier, _ in found} == {f"c{i}" for i in range(0, 20, 2)}
    assert store.query(unit(0, 20)[3], 20, where={"source": "even", "n": 4})[0][0] == "c4"
    store.close()


def test_the_same_id_is_replaced(opener: Opener) -> None:
    store = filled(opener)
    other = unit(9, 1)
    store.upsert(["c5"], other, [{"source": "new", "n": 5}])
    assert store.count() == 20
    identifier, score = store.query(other[0], 1)[0]
    assert identifier == "c5"
    assert score == pytest.approx(1, abs=1e-5)
    store.close()


def test_deleted_vectors_are_not_found_and_unknown_ids_are_fine(opener: Opener) -> None:
    store = filled(opener)
    store.delete(["c3", "nobody"])
    assert store.ids() == {f"c{i}" for i in range(20)} - {"c3"}
    assert "c3" not in {identifier for identifier, _ in store.query(unit(0, 20)[3], 19)}
    store.delete([])
    assert store.count() == 19
    store.close()


def test_everything_is_there_after_a_restart(opener: Opener) -> None:
    filled(opener).close()
    store = opener()
    assert store.count() == 20
    assert store.query(unit(0, 20)[7], 1, where={"n": 7})[0][0] == "c7"
    store.close()


def test_an_empty_store_finds_nothing(opener: Opener) -> None:
    store = opener()
    assert store.query(unit(0, 1)[0], 3) == []
    assert store.ids() == set()
    store.close()


def test_vectors_of_another_length_are_refused(opener: Opener) -> None:
    store = opener()
    with pytest.raises(RetrievalError, match="another embedder"):
        store.upsert(["a"], np.ones((1, DIMENSION + 1), dtype=np.float32), [{"n": 1}])
    store.close()


def test_vectors_come_back_by_id_and_unknown_ids_are_left_out(opener: Opener) -> None:
    store = filled(opener)
    held = store.vectors(["c7", "nobody", "c2"])
    assert set(held) == {"c7", "c2"}
    assert np.allclose(held["c7"], unit(0, 20)[7], atol=1e-6)
    store.close()


def test_more_vectors_than_one_batch_takes_are_stored_and_listed(opener: Opener, monkeypatch) -> None:
    store = opener()
    if isinstance(store, ChromaStore):
        monkeypatch.setattr(store, "_batch_size", 3)
    store.upsert([f"c{i}" for i in range(20)], unit(0, 20), [{"n": i} for i in range(20)])
    assert store.ids() == {f"c{i}" for i in range(20)}
    assert len(store.vectors([f"c{i}" for i in range(20)])) == 20
    store.delete([f"c{i}" for i in range(10)])
    assert store.count() == 10
    store.close()


def test_a_store_can_be_closed_twice_and_in_another_thread(opener: Opener) -> None:
    store = filled(opener)
    thread = threading.Thread(target=store.close)
    thread.start()
    thread.join()
    store.close()
    again = opener()
    assert again.count() == 20
    again.close()


def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    store = filled(lambda: ExactStore(tmp_path, dimension=DIMENSION))
    store.close()
    path = tmp_path / FILE_NAME
    path.write_bytes(b"no database" * 100)
    with pytest.raises(RetrievalError, match="made again from the manifest"):
        ExactStore(tmp_path, dimension=DIMENSION)


def test_a_chroma_directory_open_in_another_process_is_locked(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from exl2_rag.retrieval.lock import DirectoryLock;"
        f"lock = DirectoryLock(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(IndexLockedError, match="another process"):
            ChromaStore(tmp_path, dimension=DIMENSION)
        other.communicate("")
    ChromaStore(tmp_path, dimension=DIMENSION).close()
