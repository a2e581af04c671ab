"""Head profiles and head plans in NumPy and SciPy. Importing this package does not import JAX."""

from fairkv_jax.plan.calibrate import Calibration, Step, calibrate
from fairkv_jax.plan.cost import HARDWARE, OBJECTIVES, CostModel
from fairkv_jax.plan.head_scores import HeadScores, shipped_head_scores
from fairkv_jax.plan.make import ROW_SPLITS, STRATEGIES, default_cost, make_plan
from fairkv_jax.plan.plan import Plan, Replica
from fairkv_jax.plan.profile import Profile, shipped_profile
from fairkv_jax.plan.route import route, route_beyond, row_counts
from fairkv_jax.plan.shape import SHAPES, ModelShape, find_shape
from fairkv_jax.plan.simulate import SharedDocument, Trace, Workload, simulate, simulate_document

__all__ = [
    "HARDWARE",
    "OBJECTIVES",
    "ROW_SPLITS",
    "SHAPES",
    "STRATEGIES",
    "Calibration",
    "CostModel",
    "HeadScores",
    "ModelShape",
    "Plan",
    "Profile",
    "Replica",
    "SharedDocument",
    "Step",
    "Trace",
    "Workload",
    "calibrate",
    "default_cost",
    "find_shape",
    "make_plan",
    "route",
    "route_beyond",
    "row_counts",
    "shipped_head_scores",
    "shipped_profile",
    "simulate",
    "simulate_document",
]
