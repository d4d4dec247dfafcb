"""Kernels for decoding a few sequences at once, in CUDA C++: each reads weights and states once, at memory's bandwidth.

They are no operations of their own but steps of ``engine/fast_step.py``, which lays out the memory between them; what
they compute is what the model's own operations define.
"""
