"""Lexical search: BM25 over stemmed words, by bm25s. Rebuilt whole when the corpus changes, which takes about 0.1 ms a
chunk; saved beside the manifest and loaded again in milliseconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

IDS_FILE = "ids.json"


class Bm25Index:
    """Texts that can be searched by their words.

    Args:
        ids: one for each text.
        texts: what is searched.
        language: of the stemmer, as Snowball names it.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[str], *, language: str = "english") -> None:
        import bm25s

        self.ids = list(ids)
        self.language = language
        self._stemmer = _stemmer(language)
        tokens = bm25s.tokenize(
            list(texts), stopwords=_stopwords(language), stemmer=self._stemmer, show_progress=False, return_ids=False
        )
        self._bm25: Any = None
        if any(tokens):  # bm25s cannot index a corpus without a single word
            self._bm25 = bm25s.BM25(k1=1.2, b=0.75)
            self._bm25.index(tokens, show_progress=False)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """The k best texts that share a word with the query, best first, ties by position."""
        import bm25s

        if self._bm25 is None:
            return []
        words = bm25s.tokenize(
            query, stopwords=_stopwords(self.language), stemmer=self._stemmer, show_progress=False, return_ids=False
        )[0]
        known = [word for word in words if word in self._bm25.vocab_dict]
        if not known:
            return []
        scores = np.asarray(self._bm25.get_scores(known))
        best = np.argsort(-scores, kind="stable")[:k]
        return [(self.ids[i], float(scores[i])) for i in best if scores[i] > 0]

    def save(self, directory: Path) -> None:
        """Write the index to a directory, whole or not at all."""
        temporary = directory.with_name(directory.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if self._bm25 is not None:
            self._bm25.save(str(temporary), show_progress=False)
        about = {"ids": self.ids, "language": self.language, "empty": self._bm25 is None}
        (temporary / IDS_FILE).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)

    @classmethod
    def load(cls, directory: Path) -> Bm25Index | None:
        """Read a saved index; None if there is none, or it cannot be read and should be built again."""
        import bm25s

        try:
            about = json.loads((directory / IDS_FILE).read_text(encoding="utf-8"))
            index = cls.__new__(cls)
            index.ids, index.language = about["ids"], about["language"]
            index._stemmer = _stemmer(index.language)
            index._bm25 = None if about["empty"] else bm25s.BM25.load(str(directory), load_corpus=False)
        except (OSError, ValueError, KeyError):
            return None
        return index


def _stemmer(language: str) -> Any:
    import Stemmer

    return Stemmer.Stemmer(language)


def _stopwords(language: str) -> str | list[str]:
    return "en" if language == "english" else []
