"""Tables as lines of text, and CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from exl2_rag.retrieval.loaders.extracted import Budget, broken

_DELIMITERS = ",;\t|"
_SAMPLED_LINES = 50


def table_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows as "| a | b |", one a line; columns that are empty throughout and cells after a row's last are left out."""
    width = max((len(row) for row in rows), default=0)
    used = [column for column in range(width) if any(column < len(row) and row[column].strip() for row in rows)]
    lines = []
    for row in rows:
        cells = [" ".join(row[column].split()) if column < len(row) else "" for column in used]
        while cells and not cells[-1]:
            cells.pop()
        if len(used) == 1 and cells:
            lines.append(cells[0])
        elif cells:
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_csv(text: str, budget: Budget) -> str:
    """A CSV file as a table, whatever of , ; tab | separates its fields and however uneven its rows are."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text)):
            budget.spend_cells(len(row) + 1)
            if any(field.strip() for field in row):
                rows.append(row)
    except csv.Error as error:
        raise broken(f"not a CSV file ({error})") from error
    return table_rows(rows)


def _delimiter(text: str) -> str:
    """The separator that cuts the first lines most evenly; a comma if none does."""
    lines = [line for line in text.split("\n", _SAMPLED_LINES)[:_SAMPLED_LINES] if line.strip()]

    def evenness(delimiter: str) -> tuple[int, int]:
        counts = [line.count(delimiter) for line in lines]
        usual = max(set(counts), key=counts.count) if counts else 0
        return (counts.count(usual) if usual else 0, usual)

    return max(_DELIMITERS, key=evenness)
