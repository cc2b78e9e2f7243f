"""Loading adapters, as the user of an engine does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl2_rag.llm.lora.shelf import LoraInfo, LoraShelf


class LoraLoading:
    """The part of `ExL2LLM` that loads LoRA adapters."""

    _loras: LoraShelf

    def load_lora(self, path: str | Path, name: str | None = None) -> LoraInfo:
        """Load a LoRA adapter, a folder as PEFT writes it; requests then name it with `lora=`.

        Args:
            name: default: that of the folder. Loading the same adapter again under its name changes nothing.

        Raises:
            LoraError: the folder cannot be used with this model, or the name is taken.
            CheckpointError: its tensor file is damaged.
        """
        return self._loras.load(Path(path).expanduser(), name)

    def unload_lora(self, name: str) -> None:
        """Take an adapter away from later requests; those in progress keep it to their end.

        Raises:
            RequestError: there is none of that name.
        """
        self._loras.unload(name)

    @property
    def loras(self) -> tuple[LoraInfo, ...]:
        """The loaded adapters."""
        return self._loras.infos()
