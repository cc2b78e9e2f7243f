"""Tokens and text in, tokens and text out. Knows nothing of documents or frameworks."""
