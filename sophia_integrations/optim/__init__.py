"""The update rule, its state and its checks."""

from .estimator import Coordinates, Estimate, HessianEstimator
from .functional import sophia_update
from .groups import EIGEN_DEFAULTS, Conventions, param_groups, register_conventions
from .log_figures import LogFigures
from .progress import Progress
from .reference import reference_rho, reference_step
from .rule import Rule
from .sharding import local
from .sophia import SophiaG
from .sophia_h import SophiaH
from .trust import UNCLIPPED

__all__ = [
    "EIGEN_DEFAULTS",
    "UNCLIPPED",
    "Conventions",
    "Coordinates",
    "Estimate",
    "HessianEstimator",
    "LogFigures",
    "Progress",
    "Rule",
    "SophiaG",
    "SophiaH",
    "local",
    "param_groups",
    "reference_rho",
    "reference_step",
    "register_conventions",
    "sophia_update",
]
