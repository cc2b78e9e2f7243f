"""Calibration text of Parquet files, the form in which data sets are published; pyarrow reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exl2_rag.errors import CalibrationError

_BATCH_ROWS = 1000


def parquet_texts(path: Path) -> Iterator[str]:
    """A text for each row: its columns joined by single spaces, as ExLlamaV2's converter reads them.

    Raises:
        CalibrationError: pyarrow is not installed, or the file is no Parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path.name} is a Parquet file, and reading it takes pyarrow; install exl2-rag[parquet], or give text as "
            ".txt or .jsonl"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield " ".join(str(value) for value in row.values() if value is not None)
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} cannot be read as a Parquet file: {error}") from error
