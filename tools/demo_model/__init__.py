"""The parts of `tools/train_demo_model.py`: a small model trained from nothing to answer with quotes."""
