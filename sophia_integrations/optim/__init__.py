"""The update rule, its state and its checks."""

from .estimator import Estimate, HessianEstimator
from .reference import reference_step
from .sharding import local, whole
from .sophia import SophiaG

__all__ = ["Estimate", "HessianEstimator", "SophiaG", "local", "reference_step", "whole"]
