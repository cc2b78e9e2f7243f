"""CUDA kernels on the CPU: see emulation.h for how, backend.py for the `Backend` that launchers take."""

from tests.cuda_emulation.backend import EmulatedBackend as EmulatedBackend
