"""Assigns the heads of every layer to devices: heuristics, bounds and exact programs."""
