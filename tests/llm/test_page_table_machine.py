from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from exl2_rag.llm.page_table import HeldPages, PageTable
from tests.support.page_memory import PageMemory

TOKENS = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=14)
ROOTS = st.sampled_from([None, b"tenant"])


class Running:
    """One sequence: the pages it holds and its tokens."""

    def __init__(self, held: HeldPages, token_ids: list[int]) -> None:
        self.held = held
        self.token_ids = token_ids


class PageTableMachine(RuleBasedStateMachine):
    """Any order of starting, growing, pinning and ending sequences keeps the table sound and every row right."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.memory = PageMemory(PageTable(n_pages=7, page_size=3, root_key=b"machine"))
        self.running: list[Running] = []

    @rule(target=sequences, token_ids=TOKENS, root=ROOTS)
    def start(self, token_ids: list[int], root: bytes | None) -> Running:
        expected = self.memory.longest_cached(token_ids, len(token_ids) - 1, root)
        held = self.memory.hold(token_ids, limit=len(token_ids) - 1, root=root)
        full = expected // 3 * 3
        assert held.n_tokens in (full, expected)  # the copied rows may be left out only for want of a page
        if held.n_tokens < expected:
            assert self.memory.table.n_available == 0 or held.copy is None
        sequence = Running(held, list(token_ids))
        self.running.append(sequence)
        return sequence

    @rule(sequence=sequences, more=TOKENS)
    def grow(self, sequence: Running, more: list[int]) -> None:
        if sequence.held.pinned:
            return
        sequence.token_ids += more
        room = self.memory.table.n_available
        before = len(sequence.held.pages)
        n_fitting = self.memory.compute(sequence.held, sequence.token_ids)
        assert n_fitting == min(len(sequence.token_ids), max((before + room) * 3, sequence.held.n_tokens))

    @rule(sequence=sequences, share=st.floats(0, 1))
    def go_back(self, sequence: Running, share: float) -> None:
        if sequence.held.pinned:
            return
        wanted = int(share * sequence.held.n_tokens)
        self.memory.truncate(sequence.held, wanted)
        assert sequence.held.n_tokens in (wanted, wanted // 3 * 3)
        if sequence.held.n_tokens < wanted:  # only for want of a page
            assert self.memory.table.n_available == 0 or len(sequence.held.pages) == wanted // 3
        del sequence.token_ids[max(wanted, 1) :]

    @rule(sequence=sequences)
    def pin(self, sequence: Running) -> None:
        sequence.held.pinned = not sequence.held.pinned

    @rule(target=sequences, sequence=consumes(sequences))
    def end(self, sequence: Running) -> object:
        self.running.remove(sequence)
        self.memory.release(sequence.held)
        return multiple()

    @invariant()
    def the_table_is_sound(self) -> None:
        self.memory.check()

    @invariant()
    def every_sequence_reads_its_own_text(self) -> None:
        for sequence in self.running:
            self.memory.check_content(sequence.held, sequence.token_ids)


TestPageTableMachine = PageTableMachine.TestCase
TestPageTableMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
