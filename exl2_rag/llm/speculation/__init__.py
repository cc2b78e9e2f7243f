"""Speculation: guess the next tokens cheaply, and let one forward pass say how many were right."""
