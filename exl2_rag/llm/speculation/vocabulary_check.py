"""Whether two models speak in the same tokens."""

from __future__ import annotations

from pathlib import Path

from exl2_rag.errors import SettingsError
from exl2_rag.llm.tokenizer import Tokenizer


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer, draft_dir: Path) -> None:
    """Make sure that each token id means the same to both.

    Raises:
        SettingsError: one does not; the message names it.
    """
    expected = "draft_model must have the same tokenizer as the model"
    if target.vocab_size != draft.vocab_size:
        raise SettingsError(
            f"{expected}: it has {target.vocab_size} tokens, that of {draft_dir} {draft.vocab_size}; give a smaller "
            "model of the same family"
        )
    for token_id in range(target.vocab_size):
        one, other = target.token_bytes(token_id), draft.token_bytes(token_id)
        if one != other or target.is_special(token_id) != draft.is_special(token_id):
            raise SettingsError(
                f"{expected}: token {token_id} is {one!r} there and {other!r} in {draft_dir}; give a smaller model of "
                "the same family"
            )
