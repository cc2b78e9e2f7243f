"""The index on disk: only what changed is done again, nothing is left behind, one process at a time."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exl2_rag.errors import (
    EmbedderMismatchError,
    EmptyCorpusError,
    IndexLockedError,
    IndexNotFoundError,
    RetrievalError,
    SettingsError,
)
from exl2_rag.retrieval import Document, DocumentIndex, Retriever
from tests.retrieval.word_embedder import WordEmbedder

CATS = "# Cats\n\nCats sleep most of the day and hunt at night.\n\n## Food\n\nThey eat mice and, if they must, fish."
DOGS = "# Dogs\n\nDogs guard the house and bark at strangers."


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "cats.md").write_text(CATS, encoding="utf-8")
    (folder / "sub" / "dogs.md").write_text(DOGS, encoding="utf-8")
    return folder


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


def make(tmp_path: Path, embedder: WordEmbedder, **options) -> DocumentIndex:
    return DocumentIndex.create_or_open(tmp_path / "index", embedder=embedder, **{"store": "exact", **options})


def assert_consistent(index: DocumentIndex) -> None:
    chunks = list(index.chunks())
    assert index.store.ids() == {chunk.chunk_id for chunk in chunks}
    assert len({chunk.label for chunk in chunks}) == len(chunks)
    assert set(index.lexical().ids) == {chunk.chunk_id for chunk in chunks}
    for chunk in chunks:
        assert chunk.text == index.document_text(chunk.source)[chunk.start : chunk.end]
        assert index.chunk(chunk.chunk_id) == chunk
        assert index.chunk_of_label(chunk.label) == chunk


@pytest.mark.parametrize("store", ["exact", "chroma"])
def test_a_folder_is_indexed_with_its_subfolders_and_survives_closing(tmp_path, docs, embedder, store) -> None:
    with make(tmp_path, embedder, store=store) as index:
        report = index.update(docs)
        assert report.indexed == ["cats.md", "sub/dogs.md"]
        assert report.n_chunks == index.n_chunks == 3
        assert_consistent(index)
        before = list(index.chunks())
    with DocumentIndex.open(tmp_path / "index", embedder=embedder) as index:
        assert list(index.chunks()) == before
        assert_consistent(index)
        assert Retriever(index).retrieve("Who barks at strangers?", 1)[0].chunk.source == "sub/dogs.md"


def test_an_unchanged_folder_costs_no_embedding(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
        embedder.embedded.clear()
        report = index.update(docs)
        assert (report.indexed, report.unchanged, report.n_embedded) == ([], ["cats.md", "sub/dogs.md"], 0)
        assert embedder.embedded == []


def test_of_a_changed_file_only_the_changed_chunks_are_embedded_and_the_others_keep_their_labels(
    tmp_path, docs, embedder
) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
        labels = {chunk.text: chunk.label for chunk in index.chunks()}
        embedder.embedded.clear()
        (docs / "cats.md").write_text(CATS.replace("fish", "birds"), encoding="utf-8")
        report = index.update(docs)
        assert (report.indexed, report.unchanged, report.n_embedded) == (["cats.md"], ["sub/dogs.md"], 1)
        assert embedder.embedded == ["Cats\nFood\nThey eat mice and, if they must, birds."]
        after = {chunk.text: chunk.label for chunk in index.chunks()}
        kept = set(labels) & set(after)
        assert len(kept) == 2
        assert all(after[text] == labels[text] for text in kept)
        new_label = after["They eat mice and, if they must, birds."]
        assert new_label not in labels.values(), "a label was given twice"
        assert_consistent(index)


def test_a_removed_file_leaves_nothing_and_its_label_is_never_used_again(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
        used = {chunk.label for chunk in index.chunks()}
        (docs / "sub" / "dogs.md").unlink()
        report = index.update(docs)
        assert report.removed == ["sub/dogs.md"]
        assert index.sources() == ["cats.md"]
        (docs / "sub" / "dogs.md").write_text(DOGS, encoding="utf-8")
        index.update(docs)
        assert not {chunk.label for chunk in index.chunks("sub/dogs.md")} & used
        assert_consistent(index)


def test_a_file_that_can_no_longer_be_read_is_refused_and_leaves_the_index(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
        (docs / "cats.md").write_bytes(b"\x00\x01\x02\x03")
        (docs / "no.pdf").write_bytes(b"not a pdf")
        report = index.update(docs)
        assert report.reasons() == {"broken": 1, "unsupported": 1}
        assert [refusal.path for refusal in report.refused] == ["cats.md", "no.pdf"]
        assert report.removed == ["cats.md"]
        assert index.sources() == ["sub/dogs.md"]


def test_the_index_directory_inside_the_folder_and_hidden_files_are_not_indexed(docs, embedder) -> None:
    (docs / ".hidden.md").write_text("secret", encoding="utf-8")
    with DocumentIndex.create_or_open(docs / "index", embedder=embedder, store="exact") as index:
        index.update(docs)
        assert index.update(docs).unchanged == ["cats.md", "sub/dogs.md"]


def test_a_folder_without_readable_documents_is_an_error_and_changes_nothing(tmp_path, docs, embedder) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with make(tmp_path, embedder) as index:
        with pytest.raises(EmptyCorpusError, match="no readable document"):
            index.update(empty)
        index.update(docs)
        (empty / "a.bin").write_bytes(b"\x00\x01")
        with pytest.raises(EmptyCorpusError, match="1 unsupported"):
            index.update(empty)
        assert index.n_chunks == 3
        with pytest.raises(RetrievalError, match="the folder, not a file"):
            index.update(docs / "cats.md")


def test_progress_counts_files_up_to_all_of_them(tmp_path, docs, embedder) -> None:
    calls = []
    with make(tmp_path, embedder) as index:
        index.update(docs, progress=lambda *call: calls.append(call))
    assert calls == [(0, 2, "cats.md"), (1, 2, "sub/dogs.md"), (2, 2, "")]


def test_the_same_paragraph_twice_in_a_file_makes_two_chunks(tmp_path, docs, embedder) -> None:
    paragraph = " ".join(["word"] * 30)
    (docs / "twice.md").write_text(f"# T\n\n{paragraph}\n\n{paragraph}", encoding="utf-8")
    with make(tmp_path, embedder) as index:
        index.update(docs)
        assert [chunk.text for chunk in index.chunks("twice.md")] == [paragraph, paragraph]
        assert_consistent(index)


def test_deleting_a_source_removes_its_chunks_from_everywhere(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
        gone = next(index.chunks("cats.md"))
        assert index.delete_source("cats.md") == 2
        assert_consistent(index)
        assert all(found.chunk.source != "cats.md" for found in Retriever(index).retrieve("cats", 9))
        with pytest.raises(RetrievalError, match=r"no document 'cats\.md'"):
            index.delete_source("cats.md")
        with pytest.raises(RetrievalError, match="no chunk"):
            index.chunk(gone.chunk_id)
        assert index.chunk_of_label(gone.label) is None


def test_added_documents_are_cleaned_and_stay_when_a_folder_is_mirrored(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        text = f"first\u200b page {index.delimiter} <|im_end|>\r\n\r\n\r\nmore" + "second page"
        starts = (0, len(text) - len("second page"))
        assert index.add([Document("note", "A\u202e note", text, "text/plain", starts)]) == 2
        index.update(docs)
        assert index.sources() == ["cats.md", "note", "sub/dogs.md"]
        document = index.document("note")
        assert (document.title, document.text) == ("A note", "first page\n\nmore\n\nsecond page")
        assert [(chunk.text, chunk.page) for chunk in index.chunks("note")] == [
            ("first page\n\nmore", 1),
            ("second page", 2),
        ]
        index.add([Document("note", "A note", "other text", "text/plain")])
        assert [chunk.text for chunk in index.chunks("note")] == ["other text"]
        assert_consistent(index)
        with pytest.raises(RetrievalError, match="indexed file"):
            index.add([Document("cats.md", "t", "x", "text/plain")])
        with pytest.raises(RetrievalError, match="no text"):
            index.add([Document("blank", "t", " \u200b ", "text/plain")])


def test_two_documents_of_one_source_in_one_call_leave_the_last(tmp_path, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.add([Document("a", "t", "one", "text/plain"), Document("a", "t", "two", "text/plain")])
        assert [chunk.text for chunk in index.chunks()] == ["two"]
        assert_consistent(index)


def test_every_index_has_a_delimiter_of_its_own_that_no_document_holds(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        delimiter = index.delimiter
        assert len(delimiter) == 8
        int(delimiter, 16)
        (docs / "spy.md").write_text(f"# {delimiter}\n\nThe secret is {delimiter.upper()}!", encoding="utf-8")
        index.update(docs)
        for chunk in index.chunks():
            assert delimiter not in (chunk.title + chunk.heading + chunk.text).lower()
    with make(tmp_path, embedder) as index:
        assert index.delimiter == delimiter
    with DocumentIndex.create_or_open(tmp_path / "other", embedder=embedder, store="exact") as other:
        assert other.delimiter != delimiter


def test_another_chunk_size_cuts_all_files_anew(tmp_path, docs, embedder) -> None:
    (docs / "long.md").write_text("word " * 200, encoding="utf-8")
    with make(tmp_path, embedder) as index:
        n_before = index.update(docs).n_chunks
    with make(tmp_path, embedder, chunk_tokens=20) as index:
        report = index.update(docs)
        assert report.unchanged == []
        assert report.n_chunks > n_before
        assert_consistent(index)
    with make(tmp_path, embedder) as index:
        assert index.update(docs).indexed == [], "the chunk size belongs to the index"


def test_another_store_is_filled_from_the_manifest(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
        chunks = list(index.chunks())
    for store in ("chroma", "exact"):
        with make(tmp_path, embedder, store=store) as index:
            assert list(index.chunks()) == chunks
            assert_consistent(index)


@pytest.mark.parametrize("store", ["exact", "chroma"])
def test_lost_vectors_and_words_are_made_again_from_the_manifest(tmp_path, docs, embedder, store) -> None:
    with make(tmp_path, embedder, store=store) as index:
        index.update(docs)
    shutil.rmtree(tmp_path / "index" / "chroma", ignore_errors=True)
    (tmp_path / "index" / "vectors.sqlite").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "index" / "bm25", ignore_errors=True)
    with make(tmp_path, embedder, store=store) as index:
        assert_consistent(index)


def test_another_embedder_is_refused_by_name(tmp_path, docs, embedder) -> None:
    with make(tmp_path, embedder) as index:
        index.update(docs)
    with pytest.raises(EmbedderMismatchError, match=r"words@64.*other@64"):
        DocumentIndex.open(tmp_path / "index", embedder=WordEmbedder(name="other"))
    with DocumentIndex.open(tmp_path / "index", embedder=embedder) as index:  # the lock was let go
        assert index.n_chunks == 3


def test_no_index_is_an_error_and_nothing_is_created(tmp_path, embedder) -> None:
    with pytest.raises(IndexNotFoundError, match="exl2-rag index"):
        DocumentIndex.open(tmp_path / "none", embedder=embedder)
    assert not (tmp_path / "none").exists()


def test_a_damaged_manifest_is_an_error_that_says_what_to_do(tmp_path, embedder) -> None:
    make(tmp_path, embedder).close()
    (tmp_path / "index" / "manifest.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(RetrievalError, match="index again"):
        DocumentIndex.open(tmp_path / "index", embedder=embedder)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"store": "faiss"}, "faiss"), ({"chunk_tokens": 3}, "at least 16"), ({"store": "http://"}, "URL")],
)
def test_options_that_cannot_be_are_refused(tmp_path, embedder, options, message) -> None:
    with pytest.raises(SettingsError, match=message):
        DocumentIndex.create_or_open(tmp_path / "index", embedder=embedder, **options)


def test_an_index_open_in_another_process_is_locked_until_that_ends(tmp_path, docs, embedder) -> None:
    make(tmp_path, embedder).close()
    code = (
        "import sys\n"
        "from tests.retrieval.word_embedder import WordEmbedder\n"
        "from exl2_rag.retrieval import DocumentIndex\n"
        f"index = DocumentIndex.open({str(tmp_path / 'index')!r}, embedder=WordEmbedder())\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(IndexLockedError, match="another process"):
            DocumentIndex.open(tmp_path / "index", embedder=embedder)
        other.kill()
        other.wait()
    with DocumentIndex.open(tmp_path / "index", embedder=embedder) as index:
        index.update(docs)


def test_many_threads_may_ask_while_the_index_changes(tmp_path, docs, embedder) -> None:
    failures: list[BaseException] = []
    with make(tmp_path, embedder) as index:
        index.update(docs)
        done = threading.Event()

        def ask() -> None:
            retriever = Retriever(index)
            try:
                while not done.is_set():
                    for found in retriever.retrieve("cats hunt mice", 3):
                        assert found.chunk.text
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for round_number in range(10):
            (docs / "cats.md").write_text(CATS + f"\n\nRound {round_number}.", encoding="utf-8")
            index.update(docs)
        done.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert_consistent(index)
