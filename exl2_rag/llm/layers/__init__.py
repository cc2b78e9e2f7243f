"""The parts a decoder is made of: linear layers, embedding, norm, rotary positions, attention, gated MLP."""
