"""How the next token is chosen: what may be asked for (`params`), and one file for each family of samplers."""
