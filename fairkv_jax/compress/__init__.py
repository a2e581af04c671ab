"""KV-cache compression per head: which tokens of a prompt each KV head keeps.

A method (`contract.Method`) is composed of a scorer, which says how much each token matters to each
head, and an allocator, which spreads a layer's budget over its heads. `registry` finds methods by
name. Methods only select; the prefill moves the keys and values.

This package imports nothing by itself, so that `budgets` can be imported without JAX.
"""
