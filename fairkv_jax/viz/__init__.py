"""Pictures of heads, devices, tokens and slots, for notebooks, reports and documentation.

All functions take arrays and return a `matplotlib.figure.Figure` (`kept_text` returns HTML). Titles
state what the data show. matplotlib is an optional dependency: `pip install 'fairkv-jax[viz]'`.
"""
