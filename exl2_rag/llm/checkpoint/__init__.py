"""Models on disk: EXL2, GPTQ and plain safetensors, read with every tensor checked before use, and written.

Knows file formats and tensors; not architectures, and nothing of how a model runs.
"""

from exl2_rag.llm.checkpoint.checkpoint import Checkpoint, LayerSize
from exl2_rag.llm.checkpoint.exl2_format import pack
from exl2_rag.llm.checkpoint.reconstruct import reconstruct

__all__ = ["Checkpoint", "LayerSize", "pack", "reconstruct"]
