"""Head profiles and plans in pure NumPy and SciPy: importing this imports no JAX."""

from fairkv_jax.plan.cost import HARDWARE, CostModel
from fairkv_jax.plan.make import ROW_SPLITS, STRATEGIES, make_plan
from fairkv_jax.plan.plan import Copy, Plan
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.route import route
from fairkv_jax.plan.shape import SHAPES, ModelShape

__all__ = [
    "HARDWARE",
    "ROW_SPLITS",
    "SHAPES",
    "STRATEGIES",
    "Copy",
    "CostModel",
    "ModelShape",
    "Plan",
    "Profile",
    "make_plan",
    "route",
]
