"""One process at a time in a directory."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from exl2_rag.errors import IndexLockedError


class DirectoryLock:
    """Held from construction to `release`; the system lets go of it when the process ends, however it ends.

    Args:
        directory: made if it is not there.

    Raises:
        IndexLockedError: another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(directory / ".lock", thread_local=False)  # any thread may release it
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise IndexLockedError(
                f"{directory} is open in another process or object; close that, or give this one a directory of its own"
            ) from error

    def release(self) -> None:
        """Let others in."""
        self._lock.release()
