"""Compares the positions that our methods keep with those of NVIDIA/kvpress, on a real model."""
