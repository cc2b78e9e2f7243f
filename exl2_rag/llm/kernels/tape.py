"""A recorded sequence of native ops that runs again in one call.

A decode step is some hundred small ops on the same buffers each time; handing them out one by one from Python costs
more than some of them take. While a tape records, every op runs as usual and also leaves its arguments on the tape.
`run` repeats them: the same pointers, so whatever changes from step to step (token ids, positions, page tables) must
be written into the recorded input tensors, and results are found in the recorded outputs.

Only what goes through the native library is repeated. Anything else torch computes during the recording would be
missing, so a recording watches torch's operators and refuses all but views and fresh memory.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from exl2_rag.errors import KernelError
from exl2_rag.llm.kernels import native, status, work_memory
from exl2_rag.llm.kernels.work_memory import WorkMemory

_local = threading.local()

_SLAB_BYTES = 32 << 20

# Calls that compute nothing: properties, questions, fresh memory.
_HARMLESS = frozenset(
    {
        *("__get__", "dim", "size", "stride", "numel", "is_contiguous", "element_size", "data_ptr"),
        *("empty", "empty_like", "new_empty", "frombuffer"),
    }
)

# Calls that give another view of a tensor, as long as they do not have to copy it.
_VIEWS = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "expand"),
        *("__getitem__", "narrow", "select", "contiguous", "detach"),
    }
)


class Tape:
    """What was recorded. Holds the memory that its ops touch, until it is dropped itself.

    What an op leaves for later ones of the recording alone lies where something else lay before, or comes to lie: the
    ops run again in the same order.

    Attributes:
        memory: for the results of its ops.
        problem: why it cannot be run, once the recording has ended; None if it can.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.problem: str | None = None
        self.memory = WorkMemory(_SLAB_BYTES, 1, gives_back=False)
        self._library = library
        self._entries: list[tuple[str, int, ctypes.Structure]] = []
        self._tensors: list[Tensor] = []
        self._ops: ctypes.Array[ctypes.c_int32] | None = None
        self._arguments: ctypes.Array[ctypes.c_void_p] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, name: str, arguments: ctypes.Structure) -> None:
        """Add a call of the native op `name`."""
        number = self._library.exl2_op_index(name.encode())
        if number < 0:
            raise KernelError(f"the native library has no op '{name}'")
        self._entries.append((name, number, arguments))

    def hold(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor."""
        if not self.memory.owns(tensor.data_ptr()):
            self._tensors.append(tensor)

    def seal(self) -> None:
        """End the recording."""
        count = len(self._entries)
        self._ops = (ctypes.c_int32 * count)(*(number for _, number, _ in self._entries))
        self._arguments = (ctypes.c_void_p * count)(*(ctypes.addressof(one) for *_, one in self._entries))

    def run(self) -> None:
        """Run all ops again.

        Raises:
            KernelError, ShapeError: an op failed, for the reason it would give when called by itself.
        """
        if self._ops is None:
            raise KernelError(f"this tape cannot be run: {self.problem or 'it is still being recorded'}")
        stopped_at = ctypes.c_int64(-1)
        code = self._library.exl2_run_tape(self._ops, self._arguments, len(self._entries), ctypes.byref(stopped_at))
        if code != 0:
            status.check(self._entries[stopped_at.value][0], code)


class _Watch(TorchFunctionMode):
    """Lets our ops and views through, and names the first call that is neither.

    A mode of Python's calls, not of torch's dispatcher: that one imports the compiler, which takes a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offender: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if getattr(func, "namespace", None) == "exl2_rag" or name in _HARMLESS:
            return result
        if name in _VIEWS and isinstance(result, Tensor) and _same_memory(result, args[0]):
            return result
        if self.offender is None:
            self.offender = name
        return result


def _same_memory(view: Tensor, of: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def current() -> Tape | None:
    """The tape that this thread is recording on."""
    tape: Tape | None = getattr(_local, "tape", None)
    return tape


def is_available() -> bool:
    """Whether there is a native library to record."""
    return native.library() is not None


@contextmanager
def record() -> Iterator[Tape]:
    """Record this thread's native ops on a new tape.

    What torch computes outside the kernels would be missing from the tape; then it has a `problem` afterwards and
    cannot be run. What ran during the recording has run all the same.

    Raises:
        KernelError: there is no native library, or this thread is recording already.
    """
    library = native.library()
    if library is None:
        raise KernelError("only native kernels can be recorded, and there are none; see the notice about kernels")
    if current() is not None:
        raise KernelError("a tape is being recorded in this thread already")
    tape, watch = Tape(library), _Watch()
    _local.tape = tape
    try:
        with watch, work_memory.use(tape.memory):
            yield tape
    finally:
        _local.tape = None
    if watch.offender is None:
        tape.seal()
    else:
        tape.problem = f"the step computes {watch.offender} outside the kernels"
