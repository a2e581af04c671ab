"""Compiles the engine's own steps for GPUs that are not here, and says what they would take.

XLA's GPU compiler needs no GPU: given a description of one it makes the real machine code, for one
device or for a host of eight, with its memory, registers, spills and collectives.
"""
