"""How good a model is at predicting a text, and how far two models are apart in it.

`perplexity` for one model, `divergence` for two; `corpus` reads texts, `windows` cuts them. All of it streams: logits
are held of some hundred rows at a time, whatever the length of a text.
"""
