"""Infinitely wide equilibrium networks: their kernels, and the shallow explicit network equivalent to one."""

from perron.infinite_width.activations import (
    ScalarFunction,
    clip_abs,
    hard_tanh,
    scalar_function,
    transformed,
    two_slopes,
)
from perron.infinite_width.coefficients import (
    KernelCoefficients,
    ck_coefficients,
    explicit_coefficients,
    ntk_coefficients,
)
from perron.infinite_width.depth import DepthLimit, deep_classify, deep_ntk, depth_limit, optimal_activation
from perron.infinite_width.kernels import (
    ImplicitKernels,
    explicit_ck,
    explicit_kernels,
    explicit_ntk,
    implicit_ck,
    implicit_kernels,
    implicit_ntk,
)
from perron.infinite_width.matching import Match, MatchWarning, match_explicit
from perron.infinite_width.mean_field import MeanField, mean_field
from perron.infinite_width.mixture import GaussianMixture, MixtureSample, spectral_equivalent
from perron.infinite_width.moments import Moments, gaussian_moments
from perron.infinite_width.networks import ExplicitEquivalent, GaussianEquilibrium, explicit_equivalent
from perron.infinite_width.process import Prediction, Process
from perron.infinite_width.state import EquilibriumState, UnstableError, solve_state

__all__ = [
    "DepthLimit",
    "EquilibriumState",
    "ExplicitEquivalent",
    "GaussianEquilibrium",
    "GaussianMixture",
    "ImplicitKernels",
    "KernelCoefficients",
    "Match",
    "MatchWarning",
    "MeanField",
    "MixtureSample",
    "Moments",
    "Prediction",
    "Process",
    "ScalarFunction",
    "UnstableError",
    "ck_coefficients",
    "clip_abs",
    "deep_classify",
    "deep_ntk",
    "depth_limit",
    "explicit_ck",
    "explicit_coefficients",
    "explicit_equivalent",
    "explicit_kernels",
    "explicit_ntk",
    "gaussian_moments",
    "hard_tanh",
    "implicit_ck",
    "implicit_kernels",
    "implicit_ntk",
    "match_explicit",
    "mean_field",
    "ntk_coefficients",
    "optimal_activation",
    "scalar_function",
    "solve_state",
    "spectral_equivalent",
    "transformed",
    "two_slopes",
]
