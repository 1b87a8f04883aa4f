"""Curvature: which micro-batch to remember, how to sample labels, one estimate, its reduction over ranks."""

from .engine import UnitEstimator
from .gnb import GaussNewtonBartlett
from .likelihood import Categorical, Likelihood
from .readout import Readout, register_readout

__all__ = ["Categorical", "GaussNewtonBartlett", "Likelihood", "Readout", "UnitEstimator", "register_readout"]
