"""The update rule, its state and its checks."""

from .estimator import Estimate, HessianEstimator
from .reference import reference_step
from .sharding import local
from .sophia import SophiaG
from .sophia_h import SophiaH
from .statistics import LogFigures

__all__ = ["Estimate", "HessianEstimator", "LogFigures", "SophiaG", "SophiaH", "local", "reference_step"]
