"""The update rule, its state and its checks."""

from .estimator import Estimate, HessianEstimator
from .reference import reference_step
from .sophia import SophiaG

__all__ = ["Estimate", "HessianEstimator", "SophiaG", "reference_step"]
