"""Independent NumPy references, written from the formulas: they import nothing of the package."""
