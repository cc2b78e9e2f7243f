"""A page table together with a memory in which every row holds the token that was "computed" there.

Lets a test see that the rows a sequence reads are its own tokens, after sharing, copying, eviction and swapping.
"""

from __future__ import annotations

from exl2_rag.llm.page_table import HeldPages, PageCopy, PageTable
from exl2_rag.llm.page_table_check import check_integrity


class PageMemory:
    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.rows = [[-1] * table.page_size for _ in range(table.n_pages)]

    def hold(self, token_ids: list[int], *, limit: int, root: bytes | None = None) -> HeldPages:
        held = self.table.hold(token_ids, limit, root=root)
        self._carry_out(held.copy)
        return held

    def truncate(self, held: HeldPages, n_tokens: int) -> None:
        self._carry_out(self.table.truncate(held, n_tokens))

    def _carry_out(self, copy: PageCopy | None) -> None:
        if copy is not None:
            self.rows[copy.target][: copy.n_rows] = self.rows[copy.source][: copy.n_rows]

    def compute(self, held: HeldPages, token_ids: list[int]) -> int:
        """Write and commit the missing rows of `token_ids`, as far as pages can be had; return how many fit."""
        start = held.n_tokens
        end = max(start, self.table.extend(held, len(token_ids)))
        for position in range(start, end):
            place, row = divmod(position, self.table.page_size)
            self.rows[held.pages[place]][row] = token_ids[position]
        self.table.commit(held, token_ids[start:end])
        return end

    def release(self, held: HeldPages) -> None:
        self.table.release(held)

    def check(self) -> None:
        """The table is sound, and each page's rows hold the tokens the table says."""
        check_integrity(self.table)
        for page in self.table.pages:
            assert self.rows[page.index][: len(page.token_ids)] == page.token_ids

    def check_content(self, held: HeldPages, token_ids: list[int]) -> None:
        """What the sequence reads through its pages is its own text."""
        read = [row for index in held.pages for row in self.rows[index]]
        assert read[: held.n_tokens] == token_ids[: held.n_tokens]

    def longest_cached(self, token_ids: list[int], limit: int, root: bytes | None = None) -> int:
        """Tokens that could be reused at best below `root`, found by looking at every page and ignoring keys."""
        best = 0
        texts = self._texts(self.table.root_key if root is None else root)
        for text in texts:
            n_equal = 0
            while n_equal < min(len(text), limit) and text[n_equal] == token_ids[n_equal]:
                n_equal += 1
            best = max(best, n_equal)
        return best

    def _texts(self, root: bytes) -> list[list[int]]:
        """The whole text up to the end of each page that holds tokens."""
        by_key = {page.key: page for page in self.table.pages if page.key is not None}
        texts = []
        for page in self.table.pages:
            if page.root != root:
                continue
            text = list(page.token_ids)
            parent_key = page.parent_key
            while text and parent_key != root:
                parent = by_key[parent_key]
                text = parent.token_ids + text
                parent_key = parent.parent_key
            if text:
                texts.append(text)
        return texts
