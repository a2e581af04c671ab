"""Compression per head: a policy is a scorer of keys composed with an allocator of budgets.

A policy only says what is kept; it never touches the cache.
"""

from fairkv_jax.compress.policy import POLICIES, Policy, make_policy

__all__ = ["POLICIES", "Policy", "make_policy"]
