"""Places the heads of every layer on devices: heuristics, bounds and exact programs."""
