"""Curvature: which micro-batch to remember, how to sample labels, one estimate, its reduction over ranks."""

from .empirical_fisher import EmpiricalFisher
from .engine import UnitEstimator
from .gnb import GaussNewtonBartlett
from .hutchinson import Hutchinson
from .likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Product
from .readout import Readout, register_readout

__all__ = [
    "Bernoulli",
    "Categorical",
    "EmpiricalFisher",
    "GaussNewtonBartlett",
    "Gaussian",
    "Hutchinson",
    "Likelihood",
    "Product",
    "Readout",
    "UnitEstimator",
    "register_readout",
]
