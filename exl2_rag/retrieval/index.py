"""`DocumentIndex`: a directory on disk that holds documents, their chunks, vectors and words, kept in step.

index/  manifest.sqlite   the truth (see `manifest`)
        chroma/ or vectors.sqlite
        bm25/             words
        lock              held by the one process that has the index open
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from exl2_rag.errors import EmbedderMismatchError, IndexNotFoundError, RetrievalError, SettingsError
from exl2_rag.retrieval.bm25 import Bm25Index
from exl2_rag.retrieval.chroma_store import ChromaStore
from exl2_rag.retrieval.cleaning import clean_text, clean_title
from exl2_rag.retrieval.document import Chunk, Document
from exl2_rag.retrieval.embedding import Embedder, default_embedder
from exl2_rag.retrieval.exact_store import FILE_NAME as EXACT_FILE
from exl2_rag.retrieval.exact_store import ExactStore
from exl2_rag.retrieval.indexer import Indexer, IndexReport, Progress
from exl2_rag.retrieval.loaders import LoadLimits
from exl2_rag.retrieval.lock import DirectoryLock
from exl2_rag.retrieval.manifest import Manifest
from exl2_rag.retrieval.store import VectorStore

DEFAULT_STORE = "chroma"
DEFAULT_CHUNK_TOKENS = 512
_MANIFEST_FILE = "manifest.sqlite"
_CHROMA_DIRECTORY = "chroma"
_BM25_DIRECTORY = "bm25"
_MIN_CHUNK_TOKENS = 16


class DocumentIndex:
    """An open index; made by `open` or `create_or_open`. Many threads may use it, one process at a time.

    A context manager; `close` lets another process have it.
    """

    def __init__(
        self, path: Path, lock: DirectoryLock, manifest: Manifest, embedder: Embedder, limits: LoadLimits | None
    ) -> None:
        self._path = path
        self._directory_lock = lock
        self._manifest = manifest
        self._embedder = embedder
        self._mutex = threading.RLock()
        self._lexical: Bm25Index | None = None
        self._closed = False
        self._store = self._open_store(manifest.get("store"))
        try:
            self._indexer = Indexer(manifest, self._store, embedder, limits)
            if manifest.dirty or self._store.count() != manifest.n_chunks():
                self._indexer.repair()
        except BaseException:
            self._store.close()
            raise

    @classmethod
    def open(
        cls, path: str | Path, *, embedder: Embedder | None = None, limits: LoadLimits | None = None
    ) -> DocumentIndex:
        """Open an index that exists.

        Args:
            path: its directory.
            embedder: the one it was built with; None: the default one.
            limits: bounds for files read by `update`.

        Raises:
            IndexNotFoundError: there is no index.
            IndexLockedError: another process has it open.
            EmbedderMismatchError: it was built with another embedder.
            RetrievalError: it is damaged.
        """
        directory = Path(path)
        if not (directory / _MANIFEST_FILE).is_file():
            raise IndexNotFoundError(f"there is no index at {directory}; make one with: exl2-rag index DIRECTORY")
        return cls._open(directory, embedder, None, None, limits)

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        *,
        embedder: Embedder | None = None,
        store: str | None = None,
        chunk_tokens: int | None = None,
        limits: LoadLimits | None = None,
    ) -> DocumentIndex:
        """Open the index at `path`, or make an empty one there.

        Args:
            path: a directory, made if absent.
            embedder: None: the default one.
            store: "chroma" (embedded), "exact", or the URL of a Chroma server. None: what the index has, or "chroma".
                Another one than the index has: the vectors are computed anew for it.
            chunk_tokens: tokens of a chunk at most, by the embedder's count and never more than it takes. None: what
                the index has, or 512. Another number: `update` cuts all files anew.
            limits: bounds for files read by `update`.

        Raises:
            As `open`, but for IndexNotFoundError; SettingsError for a store or chunk size that cannot be.
        """
        directory = Path(path)
        if directory.exists() and not directory.is_dir():
            raise SettingsError(f"the index is a directory, but {directory} is a file; choose another path")
        if store is not None and store not in ("chroma", "exact") and not re.match(r"https?://[^/\s]", store):
            raise SettingsError(f'store must be "chroma", "exact" or the URL of a Chroma server, got {store!r}')
        if chunk_tokens is not None and chunk_tokens < _MIN_CHUNK_TOKENS:
            raise SettingsError(f"chunk_tokens must be at least {_MIN_CHUNK_TOKENS}, got {chunk_tokens}")
        directory.mkdir(parents=True, exist_ok=True)
        return cls._open(directory, embedder, store, chunk_tokens, limits)

    @classmethod
    def _open(
        cls,
        directory: Path,
        embedder: Embedder | None,
        store: str | None,
        chunk_tokens: int | None,
        limits: LoadLimits | None,
    ) -> DocumentIndex:
        embedder = embedder or default_embedder()
        lock = DirectoryLock(directory)
        manifest: Manifest | None = None
        try:
            path = directory / _MANIFEST_FILE
            if path.is_file():
                manifest = Manifest.open(path)
            else:
                manifest = Manifest.create(
                    path,
                    embedder_id=embedder.id,
                    store=store or DEFAULT_STORE,
                    chunk_tokens=chunk_tokens or DEFAULT_CHUNK_TOKENS,
                )
            if manifest.get("embedder_id") != embedder.id:
                raise EmbedderMismatchError(
                    f"the index at {directory} was built with the embedder {manifest.get('embedder_id')}, got "
                    f"{embedder.id}; their vectors do not compare. Open it with the first, or make a new index"
                )
            if store is not None and store != manifest.get("store"):
                manifest.mark_dirty()
                manifest.put("store", store)
            if chunk_tokens is not None and str(chunk_tokens) != manifest.get("chunk_tokens"):
                manifest.put("chunk_tokens", str(chunk_tokens))
            return cls(directory, lock, manifest, embedder, limits)
        except BaseException:
            if manifest is not None:
                manifest.close()
            lock.release()
            raise

    @property
    def index_id(self) -> str:
        """Names this index among others; made with it, and never changed."""
        return self._manifest.get("index_id")

    def update(self, directory: str | Path, progress: Progress | None = None) -> IndexReport:
        """Make the index mirror the files in `directory`: new and changed files are indexed, vanished ones removed.

        An index mirrors one directory: another one takes the place of the first. Killed half-way, the same call
        finishes the work. A file that cannot be read is counted in the report, never fatal.

        Args:
            directory: a folder of documents.
            progress: called with (files done, files in all, name of the file now begun).

        Raises:
            EmptyCorpusError: it holds no readable document; the index stays as it was.
            RetrievalError: it is no directory.
        """
        root = Path(directory)
        if not root.is_dir():
            raise RetrievalError(f"expected a directory of documents, got {root}; give the folder, not a file")
        with self._mutex:
            return self._indexer.update(root, self._path, progress)

    def add(self, documents: Iterable[Document]) -> int:
        """Index documents that are not files; `update` leaves them alone. They are cleaned first.

        A document of the same `source` takes the place of the former one.

        Returns:
            How many chunks were embedded.

        Raises:
            RetrievalError: the source is that of an indexed file.
        """
        with self._mutex:
            return self._indexer.add(self._cleaned(document) for document in documents)

    def delete_source(self, source: str) -> int:
        """Remove one document with its chunks; returns how many chunks it had.

        Raises:
            RetrievalError: there is no such document.
        """
        with self._mutex:
            n_chunks = len(self._manifest.chunks_of(source))
            self._indexer.remove([source])
            return n_chunks

    def sources(self) -> list[str]:
        """Names of all documents, sorted."""
        return list(self._manifest.sources())

    def document(self, source: str) -> Document:
        """A document as it was indexed; RetrievalError if there is none of that name."""
        return self._manifest.document(source)

    def document_text(self, source: str) -> str:
        """The cleaned text all offsets of that document's chunks refer to."""
        return self._manifest.document(source).text

    def chunk(self, chunk_id: str) -> Chunk:
        """One chunk; RetrievalError if there is none of that id."""
        found = self._manifest.chunks([chunk_id])
        if not found:
            raise RetrievalError(f"the index holds no chunk {chunk_id!r}")
        return found[chunk_id]

    def chunk_of_label(self, label: str) -> Chunk | None:
        """The chunk that is called `label` in prompts, such as "d17", or None."""
        return self._manifest.chunk_of_label(label)

    def find_chunks(self, chunk_ids: Iterable[str]) -> dict[str, Chunk]:
        """Those of these chunks that are in the index, by id."""
        return self._manifest.chunks(list(chunk_ids))

    def chunks(self, source: str | None = None) -> Iterator[Chunk]:
        """All chunks, or those of one document, in order."""
        return iter(self._manifest.chunks_of(source)) if source is not None else self._manifest.all_chunks()

    @property
    def path(self) -> Path:
        """The index's directory."""
        return self._path

    @property
    def delimiter(self) -> str:
        """Secret of this index, 8 hexadecimal digits; no document text holds it."""
        return self._manifest.get("delimiter")

    @property
    def embedder(self) -> Embedder:
        """The embedder it was built with."""
        return self._embedder

    @property
    def store(self) -> VectorStore:
        """Its vectors."""
        return self._store

    @property
    def n_chunks(self) -> int:
        """How many chunks it holds."""
        return self._manifest.n_chunks()

    def lexical(self) -> Bm25Index:
        """Its words, built anew if the chunks have changed since they were last built."""
        with self._mutex:
            generation = self._manifest.generation
            if self._lexical is None or self._lexical.generation != generation:
                self._lexical = Bm25Index.load(self._path / _BM25_DIRECTORY)
            if self._lexical is None or self._lexical.generation != generation:
                chunks = list(self._manifest.all_chunks())
                texts = [f"{chunk.title}\n{chunk.heading}\n{chunk.text}" for chunk in chunks]
                self._lexical = Bm25Index([chunk.chunk_id for chunk in chunks], texts, generation=generation)
                self._lexical.save(self._path / _BM25_DIRECTORY)
            return self._lexical

    def close(self) -> None:
        """Let go of all files and the lock; idempotent."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._store.close()
                self._manifest.close()
                self._directory_lock.release()

    def __enter__(self) -> DocumentIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_store(self, kind: str) -> VectorStore:
        dimension = self._embedder.dimension
        if kind != "chroma":
            shutil.rmtree(self._path / _CHROMA_DIRECTORY, ignore_errors=True)
        if kind != "exact":
            (self._path / EXACT_FILE).unlink(missing_ok=True)
        if kind == "exact":
            return ExactStore(self._path, dimension=dimension)
        if kind == "chroma":
            return ChromaStore(self._path / _CHROMA_DIRECTORY, dimension=dimension)
        return ChromaStore(kind, dimension=dimension, collection=f"exl2-rag-{self._manifest.get('index_id')}")

    def _cleaned(self, document: Document) -> Document:
        """The document as a loader would have made it; page starts move with the text before them."""
        pages = [*document.page_starts[1:], len(document.text)] if document.page_starts else [len(document.text)]
        texts: list[str] = []
        start = 0
        for end in pages:
            texts.append(clean_text(document.text[start:end], delimiter=self.delimiter))
            start = end
        starts, length = [], 0
        for text in texts:
            starts.append(length)
            length += len(text) + (2 if text else 0)
        joined = "\n\n".join(text for text in texts if text)
        if not joined.strip():
            raise RetrievalError(f"the document {document.source!r} has no text")
        title = clean_title(document.title, delimiter=self.delimiter) or "Untitled"
        return replace(document, title=title, text=joined, page_starts=tuple(starts) if document.page_starts else ())
