"""Text in, ranked chunks out. Knows nothing of the engine."""
