"""Attention operations, each in a folder: a reference in plain JAX and one file per backend."""
