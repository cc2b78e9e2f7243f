"""The arithmetic of the engine, one op at a time. Knows tensors only: no layers, no models, no files of weights.

ops.py        the door: one typed function per op
reference.py  the same ops in plain torch, each under the same name
native.py     finds or builds the C++ library; cpu_ops.py calls it
weights.py    the packed matrices that ops multiply by
cpu/*.cpp     the C++; exl2_layout.h: the bit layout, once for all devices
"""
