"""Bring manifest and vector store in step with a directory, doing only what has changed.

The order of writing makes a crash at any point repairable:

    load, cut, embed (nothing written yet)
    manifest: dirty
    store:    new vectors            killed here: vectors nobody knows        -> `repair` deletes them
    manifest: documents and chunks   killed here: vectors of chunks now gone  -> `repair` deletes them
    store:    old vectors deleted
    manifest: clean
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from exl2_rag.errors import DocumentError, EmptyCorpusError, RetrievalError, TextTooLongError
from exl2_rag.retrieval.bm25 import TOKENIZATION_VERSION
from exl2_rag.retrieval.chunking import CHUNKING_VERSION, chunk_id_of, embedded_text, split_document
from exl2_rag.retrieval.cleaning import CLEANING_VERSION
from exl2_rag.retrieval.document import Chunk, Document
from exl2_rag.retrieval.embedding import Embedder
from exl2_rag.retrieval.loaders import LOADING_VERSION, LoadLimits, load_document
from exl2_rag.retrieval.manifest import Manifest, Origin, PreparedSource
from exl2_rag.retrieval.store import VectorStore

Progress = Callable[[int, int, str], None]
"""Called with files done, files in all, and the file now begun."""

_FLUSH_CHUNKS = 256  # written together; a kill loses at most their embedding
_SKIPPED_NAMES = frozenset(["__pycache__", "node_modules"])


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that could not be indexed.

    Attributes:
        path: relative to the directory.
        reason: one word, see `load_document`.
        message: for people.
    """

    path: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an update did.

    Attributes:
        indexed, unchanged, removed: files, by their path relative to the directory.
        refused: files that could not be read.
        n_chunks: chunks in the index after the update.
        n_embedded: chunks that had to be embedded for it.
    """

    indexed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    n_chunks: int = 0
    n_embedded: int = 0

    def reasons(self) -> dict[str, int]:
        """How many files were refused for which reason."""
        return dict(sorted(Counter(refusal.reason for refusal in self.refused).items()))


class Indexer:
    """Writes to one manifest and one store.

    Args:
        manifest: open.
        store: open; belongs to the manifest.
        embedder: of the manifest's embedder id.
        limits: bounds for one file.
    """

    def __init__(
        self, manifest: Manifest, store: VectorStore, embedder: Embedder, limits: LoadLimits | None = None
    ) -> None:
        self._manifest = manifest
        self._store = store
        self._embedder = embedder
        self._limits = limits
        self._delimiter = manifest.get("delimiter")
        self._chunk_limit = min(int(manifest.get("chunk_tokens")), embedder.max_tokens)
        versions = (CLEANING_VERSION, LOADING_VERSION, CHUNKING_VERSION, TOKENIZATION_VERSION)
        self._pipeline_hash = _hash(repr((versions, self._chunk_limit, embedder.id)).encode())

    def update(self, directory: Path, skipped: Path, progress: Progress | None = None) -> IndexReport:
        """Make the index mirror the files below `directory`; added documents stay.

        Args:
            directory: all plain files in it and below, but for hidden ones.
            skipped: a directory to leave out, the index's own.

        Raises:
            EmptyCorpusError: no file can be read; the index stays as it was.
        """
        self._repair_if_dirty()
        files = dict(scan_files(directory, skipped))
        known = {name: state for name, state in self._manifest.sources().items() if state.origin == "file"}
        batch = _Batch(self)
        indexed: list[str] = []
        unchanged: list[str] = []
        refused: list[Refusal] = []
        embedded = 0
        for done, (name, path) in enumerate(sorted(files.items())):
            if progress is not None:
                progress(done, len(files), name)
            try:
                content_hash = _hash_file(path)
                state = known.get(name)
                if state and (state.content_hash, state.pipeline_hash) == (content_hash, self._pipeline_hash):
                    unchanged.append(name)
                else:
                    document = load_document(
                        directory / name, root=directory, delimiter=self._delimiter, limits=self._limits
                    )
                    batch.add(self._prepare(document, content_hash, "file"))
                    indexed.append(name)
            except DocumentError as error:
                refused.append(Refusal(name, error.reason, str(error)))
            embedded += batch.flush(at_least=_FLUSH_CHUNKS)
        if not indexed and not unchanged:
            reasons = IndexReport(refused=refused).reasons()
            raise EmptyCorpusError(
                f"no readable document in {directory}"
                + (f"; refused: {', '.join(f'{n} {reason}' for reason, n in reasons.items())}" if reasons else "")
                + "; give a directory with documents (text, Markdown, HTML, PDF, Office, ...)"
            )
        embedded += batch.flush()
        vanished = sorted(set(known).difference(indexed, unchanged))
        self.remove(vanished)
        self._manifest.mark_clean()
        if progress is not None:
            progress(len(files), len(files), "")
        return IndexReport(indexed, unchanged, vanished, refused, self._manifest.n_chunks(), embedded)

    def add(self, documents: Iterable[Document]) -> int:
        """Index cleaned documents that are no files; returns how many chunks were embedded."""
        self._repair_if_dirty()
        batch = _Batch(self)
        embedded = 0
        for document in documents:
            state = self._manifest.sources().get(document.source)
            if state is not None and state.origin == "file":
                raise RetrievalError(f"{document.source!r} is an indexed file; give the document another source")
            batch.add(self._prepare(document, _hash(repr(document).encode("utf-8", "surrogatepass")), "added"))
            embedded += batch.flush(at_least=_FLUSH_CHUNKS)
        embedded += batch.flush()
        self._manifest.mark_clean()
        return embedded

    def remove(self, sources: Iterable[str]) -> None:
        """Take documents out of the index."""
        names = list(sources)
        if not names:
            return
        for name in names:
            self._manifest.document(name)
        self._manifest.mark_dirty()
        self._store.delete(self._manifest.remove(names))
        self._manifest.mark_clean()

    def _repair_if_dirty(self) -> None:
        """An update of this process that an error cut short leaves the same traces as a killed one."""
        if self._manifest.dirty:
            self.repair()

    def repair(self) -> int:
        """Make the store hold exactly the manifest's chunks; returns how many had to be embedded again."""
        self._manifest.mark_dirty()
        wanted = self._manifest.chunk_ids()
        present = self._store.ids()
        self._store.delete(sorted(present - wanted))
        missing = wanted - present
        pending: list[Chunk] = []
        for chunk in self._manifest.all_chunks() if missing else ():
            if chunk.chunk_id in missing:
                pending.append(chunk)
            if len(pending) >= _FLUSH_CHUNKS:
                self._embed_into_store(pending)
                pending = []
        self._embed_into_store(pending)
        self._manifest.mark_clean()
        return len(missing)

    def write(self, prepared: list[PreparedSource]) -> int:
        """Write documents to store and manifest; returns how many chunks were embedded. Leaves the manifest dirty."""
        texts: dict[str, tuple[str, str]] = {}  # chunk id -> source, embedded text
        for one in prepared:
            document = one.document
            for chunk_id, span in one.chunks:
                text = self._embedded_text(document.title, span.heading, document.text[span.start : span.end])
                texts[chunk_id] = (document.source, text)
        known = self._manifest.chunks(list(texts))
        fresh = {chunk_id: held for chunk_id, held in texts.items() if chunk_id not in known}
        vectors = self._embedder.embed([text for _, text in fresh.values()]) if fresh else None
        self._manifest.mark_dirty()
        if vectors is not None:
            self._store.upsert(list(fresh), vectors, [{"source": source} for source, _ in fresh.values()])
        self._store.delete(self._manifest.replace(prepared))
        return len(fresh)

    def _prepare(self, document: Document, content_hash: str, origin: Origin) -> PreparedSource:
        try:
            spans = split_document(document, self._count_tokens, self._chunk_limit)
        except TextTooLongError as error:
            raise DocumentError(f"{document.source}: {error}", reason="text-too-long") from error
        seen: Counter[tuple[str, str]] = Counter()
        chunks = []
        for span in spans:
            text = document.text[span.start : span.end]
            seen[span.heading, text] += 1
            occurrence = seen[span.heading, text]
            chunks.append((chunk_id_of(document.source, document.title, span.heading, text, occurrence), span))
        return PreparedSource(document, content_hash, self._pipeline_hash, origin, tuple(chunks))

    def _embed_into_store(self, chunks: list[Chunk]) -> None:
        if chunks:
            vectors = self._embedder.embed([self._embedded_text(one.title, one.heading, one.text) for one in chunks])
            self._store.upsert([one.chunk_id for one in chunks], vectors, [{"source": one.source} for one in chunks])

    def _embedded_text(self, title: str, heading: str, text: str) -> str:
        return embedded_text(title, heading, text, self._count_tokens, self._chunk_limit)

    def _count_tokens(self, text: str) -> int:
        return self._embedder.count_tokens([text])[0]


class _Batch:
    """Prepared documents that wait to be written together."""

    def __init__(self, indexer: Indexer) -> None:
        self._indexer = indexer
        self._prepared: list[PreparedSource] = []

    def add(self, prepared: PreparedSource) -> None:
        self._prepared.append(prepared)

    def flush(self, at_least: int = 0) -> int:
        """Write if there are `at_least` chunks; returns how many were embedded."""
        if not self._prepared or sum(len(one.chunks) for one in self._prepared) < at_least:
            return 0
        prepared, self._prepared = self._prepared, []
        return self._indexer.write(prepared)


def scan_files(directory: Path, skipped: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to `directory`, path) of everything that is not hidden; links to directories are not followed."""
    left_out = skipped.resolve()
    for folder, subfolders, names in os.walk(directory):
        base = Path(folder)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and name not in _SKIPPED_NAMES and (base / name).resolve() != left_out
        )
        for name in sorted(names):
            if not name.startswith("."):
                path = base / name
                yield path.relative_to(directory).as_posix(), path


def _hash_file(path: Path) -> str:
    """Hash of a file's bytes; DocumentError if they cannot be read."""
    try:
        path.as_posix().encode("utf-8")
        if not path.is_file():
            raise DocumentError(f"{path} is not a plain file", reason="unreadable")
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except UnicodeEncodeError as error:
        raise DocumentError(f"{path!r} has a name that is not valid text; rename it", reason="unreadable") from error
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
