"""Where the demo model and the demo documents are. The model's card (README.md beside it) says what it can do."""

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


def documents_dir() -> Path:
    """Directory of the demo documents: this project's manuals in five formats.

    Raises:
        ModelNotFoundError: this installation was built without them.
    """
    package = Path(__file__).parent
    for directory in (package / "documents", package.parent / "examples" / "document_qa" / "documents"):
        if directory.is_dir():
            return directory
    raise ModelNotFoundError(
        f"expected the demo documents in {package / 'documents'}, found none; install the package from its wheel "
        "or run the demo in its repository"
    )
