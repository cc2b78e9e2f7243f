"""How many document tokens are reused by the order in which chunks stand in the prompt, on a simulated load.

    python benchmarks/canonical_order.py [--queries N]

2,000 chunks of about 200 tokens in 100 topics; a query is about one topic, drawn by a Zipf law of exponent 1, and finds
k = 6 chunks: three quarters of that topic, drawn by a Zipf law again, the rest noise. Prompts are a system text of 100
tokens, the chunks, a question of 30, and an answer of 40; they go through the real page table, one after the other, as
the engine would have it do. Orders: as retrieved ("relevance"), by id, by popularity so far, and the deepest cached
path (`cached_order`), its ties by id or by popularity. No model runs: tokens are counted, which do not depend on one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

from exl2_rag.llm.cached_order import cached_order
from exl2_rag.llm.page_table import PageTable
from exl2_rag.llm.page_table_check import check_integrity

CHUNKS, TOPICS, K = 2_000, 100, 6
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 100, 30, 40
NOISE, ZIPF = 0.25, 1.0
PAGE_SIZE = 32
TARGET = 1.7

Order = Callable[[PageTable, list[int], Counter[int]], list[int]]


class Corpus:
    """Token ids of the texts; every chunk begins with the same header, as the prompt form has it."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.system = [rng.randrange(32_000) for _ in range(SYSTEM_TOKENS)]
        header = [rng.randrange(32_000) for _ in range(8)]
        self.chunks = [
            [*header, *(rng.randrange(32_000) for _ in range(rng.randrange(142, 243)))] for _ in range(CHUNKS)
        ]


def zipf(n: int, exponent: float) -> list[float]:
    """Cumulative weights of ranks 1 to n."""
    return list(accumulate(1 / rank**exponent for rank in range(1, n + 1)))


def queries(count: int, seed: int) -> list[list[int]]:
    """The chunks each query finds, best first."""
    rng = random.Random(seed)
    members = list(range(CHUNKS))
    rng.shuffle(members)
    per_topic = CHUNKS // TOPICS
    topic_weights, chunk_weights = zipf(TOPICS, ZIPF), zipf(per_topic, ZIPF)
    found = []
    for _ in range(count):
        topic = rng.choices(range(TOPICS), cum_weights=topic_weights)[0]
        own = members[topic * per_topic : (topic + 1) * per_topic]
        chosen: list[int] = []
        while len(chosen) < K:
            if rng.random() < NOISE:
                chunk = rng.randrange(CHUNKS)
            else:
                chunk = own[rng.choices(range(per_topic), cum_weights=chunk_weights)[0]]
            if chunk not in chosen:
                chosen.append(chunk)
        rng.shuffle(chosen)  # which of them is the best match depends on the question
        found.append(chosen)
    return found


def by_popularity(chunks: list[int], seen: Counter[int]) -> list[int]:
    return sorted(chunks, key=lambda chunk: (-seen[chunk], chunk))


def orders(corpus: Corpus) -> dict[str, Order]:
    def deepest(table: PageTable, preferred: list[int]) -> list[int]:
        blocks = [corpus.chunks[chunk] for chunk in preferred]
        return [preferred[place] for place in cached_order(table, corpus.system, blocks)]

    return {
        "relevance": lambda _table, chunks, _seen: chunks,
        "sorted by id": lambda _table, chunks, _seen: sorted(chunks),
        "by popularity": lambda _table, chunks, seen: by_popularity(chunks, seen),
        "deepest path, then id": lambda table, chunks, _seen: deepest(table, sorted(chunks)),
        "deepest path, then popularity": lambda table, chunks, seen: deepest(table, by_popularity(chunks, seen)),
    }


def simulate(corpus: Corpus, load: list[list[int]], order: Order, n_pages: int) -> dict[str, object]:
    """Send the load through a page table of `n_pages` pages."""
    rng = random.Random(7)
    table = PageTable(n_pages, PAGE_SIZE)
    seen: Counter[int] = Counter()
    n_document = n_reused = 0
    order_s = 0.0
    for chunks in load:
        started = time.perf_counter()
        ordered = order(table, chunks, seen)
        order_s += time.perf_counter() - started
        assert sorted(ordered) == sorted(chunks)
        seen.update(chunks)
        documents = [token for chunk in ordered for token in corpus.chunks[chunk]]
        tokens = [*corpus.system, *documents, *(rng.randrange(32_000) for _ in range(QUESTION_TOKENS + ANSWER_TOKENS))]
        n_prompt = len(tokens) - ANSWER_TOKENS
        held = table.hold(tokens, n_prompt - 1)
        n_document += len(documents)
        n_reused += min(max(0, held.n_tokens - SYSTEM_TOKENS), len(documents))
        table.extend(held, len(tokens))
        table.commit(held, tokens[held.n_tokens :])
        table.release(held)
    check_integrity(table)
    return {
        "reused_share": round(n_reused / n_document, 4),
        "reused_tokens": n_reused,
        "document_tokens": n_document,
        "evicted_pages": table.n_evicted,
        "order_ms": round(order_s / len(load) * 1000, 3),
    }


def measure(n_queries: int) -> dict[str, object]:
    """Every order, with a cache that holds everything and with one of a tenth of the corpus."""
    corpus, load = Corpus(1), queries(n_queries, 2)
    corpus_pages = sum(-(-len(chunk) // PAGE_SIZE) for chunk in corpus.chunks)
    prompt_pages = -(-(SYSTEM_TOKENS + K * 250 + QUESTION_TOKENS + ANSWER_TOKENS) // PAGE_SIZE) + 1
    caches = {"unlimited": n_queries * prompt_pages, "limited": corpus_pages // 10}
    results: dict[str, object] = {}
    for name, n_pages in caches.items():
        rows = {title: simulate(corpus, load, order, n_pages) for title, order in orders(corpus).items()}
        base = rows["relevance"]["reused_share"]
        for row in rows.values():
            row["times_relevance"] = round(row["reused_share"] / base, 2)  # type: ignore[operator]
        results[name] = {"cache_tokens": n_pages * PAGE_SIZE, "orders": rows}
    return {
        "chunks": CHUNKS,
        "topics": TOPICS,
        "k": K,
        "queries": n_queries,
        "zipf": ZIPF,
        "noise": NOISE,
        "page_size": PAGE_SIZE,
        "target_times_relevance": TARGET,
        "caches": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1500)
    options = parser.parse_args()
    print(json.dumps(measure(options.queries)))


if __name__ == "__main__":
    main()
