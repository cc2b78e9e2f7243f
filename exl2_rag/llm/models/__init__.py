"""Model architectures: a table of what each does differently, and one decoder that is built from it."""
