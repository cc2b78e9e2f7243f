"""Where the demo model is. It comes with the package; its card (README.md beside it) says what it can do."""

from __future__ import annotations

from pathlib import Path

from exl2_rag.errors import ModelNotFoundError


def model_dir() -> Path:
    """Directory of the EXL2 demo model.

    Raises:
        ModelNotFoundError: this installation was built without it.
    """
    directory = Path(__file__).parent / "demo_model"
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"expected the demo model in {directory}, found none; install the package from its wheel or repository, "
            "or make one with tools/train_demo_model.py"
        )
    return directory
