"""Measurements on one GPU: numerics, bandwidth, emulated tensor parallelism, the demo model."""
