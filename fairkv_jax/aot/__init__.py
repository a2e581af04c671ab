"""Compiles the engine's steps ahead of time for GPUs, and reports the resources that they use.

No GPU is needed: from the description of a GPU, XLA generates the actual machine code for one or
several devices. The report contains memory, registers, spills and collectives.
"""
