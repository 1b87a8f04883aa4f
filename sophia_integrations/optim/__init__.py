"""The update rule, its state and its checks."""

from .estimator import Coordinates, Estimate, HessianEstimator
from .groups import EIGEN_DEFAULTS, Conventions, param_groups, register_conventions
from .reference import reference_rho, reference_step
from .sharding import local
from .sophia import SophiaG
from .sophia_h import SophiaH
from .statistics import LogFigures
from .trust import UNCLIPPED

__all__ = [
    "EIGEN_DEFAULTS",
    "UNCLIPPED",
    "Conventions",
    "Coordinates",
    "Estimate",
    "HessianEstimator",
    "LogFigures",
    "SophiaG",
    "SophiaH",
    "local",
    "param_groups",
    "reference_rho",
    "reference_step",
    "register_conventions",
]
