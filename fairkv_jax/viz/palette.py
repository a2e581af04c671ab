"""Colours that people with any colour vision can tell apart."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
"""Okabe and Ito's colours, which differ in lightness too; two of Tol's follow them."""
INK, SOFT, LINE, PAPER = "#1d2430", "#5d6675", "#d9dee6", "#ffffff"
SEQUENTIAL = "Blues"
"""matplotlib's colour map of quantities: one hue, so that only lightness carries the value."""
