"""Measures what the compression of the KV cache costs in quality: `python -m fairkv_jax.evaluate`.

tasks       documents made by code, with questions     tasks, needles, variables, words, haystack
own data    the user's questions and texts             user_data, likelihood
runners     the engine in this process, or a server    engine_runner, server_runner
sweep       runs what is missing, row by row           sweep, results
report      figures, a table and a page                summary, statistics, report, charts
"""
