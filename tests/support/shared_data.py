"""Where tests find the data that stands beside a development checkout: `../shared`.

Tests that need it skip, with the reason, where it is absent (an installed package, a plain clone).
"""

from __future__ import annotations

from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]


def shared_path(relative: str) -> Path:
    """The file or folder `relative` of the shared data; skips the calling test where there is none."""
    path = _REPOSITORY.parent / "shared" / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared data, which stands beside a development checkout")
    return path
