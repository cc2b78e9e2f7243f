"""The working directory of a conversion: what is done stays done, whenever the process ends.

    record.json                what is converted, and how; a directory of another conversion is refused
    calibration.safetensors    token ids
    measured/<block>.json      one file for each block that has been measured
    strategy.json              the layouts that were chosen
    matrices/<key>.safetensors the tensors of each finished matrix
    states.safetensors         hidden states after some block, so that a resumed job need not run all blocks again

Every file appears under its name only when it is complete, so a job killed at any point goes on from the last block.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from exl2_rag.errors import ConversionError

_VERSION: Final = 1
_RECORD, _STATES, _STRATEGY = "record.json", "states.safetensors", "strategy.json"


class Job:
    """A working directory.

    Args:
        directory: made if absent.
        record: what is converted and how: plain data.
        fresh: delete what an earlier conversion left there.

    Raises:
        ConversionError: the directory holds another conversion, or something that is none.
    """

    def __init__(self, directory: Path, record: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.directory = directory
        if fresh and (directory / _RECORD).is_file():
            shutil.rmtree(directory)
        wanted = {"version": _VERSION, **record}
        if directory.is_dir() and any(directory.iterdir()):
            self._compare(wanted)
        else:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConversionError(f"cannot make the job directory {directory}: {error}") from error
            self.write_json(_RECORD, wanted)

    def _compare(self, wanted: Mapping[str, Any]) -> None:
        path = self.directory / _RECORD
        if not path.is_file():
            raise ConversionError(f"{self.directory} is not empty and holds no conversion; give an empty directory")
        found = self.read_json(_RECORD)
        plain = json.loads(json.dumps(wanted))
        differing = sorted(key for key in {*found, *plain} if found.get(key) != plain.get(key))
        if differing:
            key = differing[0]
            raise ConversionError(
                f"{self.directory} holds a conversion with {key} {found.get(key)!r:.120}, asked for is "
                f"{plain.get(key)!r:.120}; ask for the same to resume it, give another job directory, or start afresh"
            )

    # --- plain data ------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.directory / name).is_file()

    def read_json(self, name: str) -> Any:
        """A JSON file.

        Raises:
            ConversionError: it is damaged.
        """
        path = self.directory / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path} is damaged: {error}; delete it to have that part done again") from error

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self._write(name, lambda path: path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))

    # --- tensors ---------------------------------------------------------------------------------------------------

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """A safetensors file.

        Raises:
            ConversionError: it is damaged.
        """
        path = self.directory / name
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{path} is damaged: {error}; delete it to have that part done again") from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file, whole or not at all."""
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._write(name, lambda path: save_file(contiguous, path))

    @staticmethod
    def measured_name(block: str) -> str:
        """The file of a measured block."""
        return f"measured/{block}.json"

    @staticmethod
    def matrix_name(key: str) -> str:
        """The file of a finished matrix."""
        return f"matrices/{key}.safetensors"

    # --- hidden states ---------------------------------------------------------------------------------------------

    def save_states(self, stage: str, done: int, states: Mapping[str, Tensor]) -> None:
        """Keep the hidden states after `done` blocks of a stage; the last ones kept are replaced."""
        self.write_tensors(_STATES, dict(states))
        self.write_json("states.json", {"stage": stage, "done": done, "check": self._states_check()})

    def load_states(self, stage: str, at_most: int) -> tuple[int, dict[str, Tensor]] | None:
        """The states kept for a stage and after how many blocks; None if there are none that help."""
        if not (self.has("states.json") and self.has(_STATES)):
            return None
        note = self.read_json("states.json")
        # A process that ended between the two files left states that the note does not describe.
        if note["stage"] != stage or note["done"] > at_most or note["check"] != self._states_check():
            return None
        return int(note["done"]), self.read_tensors(_STATES)

    def _states_check(self) -> str:
        stat = (self.directory / _STATES).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def spill_file(self, name: str) -> Path:
        """Where states that are too large for memory may lie."""
        return self.directory / f"{name}.spill"

    def _write(self, name: str, write: Any) -> None:
        path = self.directory / name
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ConversionError(
                f"cannot write {path}: {error}; make room or correct the permissions and start again: the job resumes"
            ) from error


def tensor_hash(tensor: Tensor) -> str:
    """Names the contents of a tensor."""
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
