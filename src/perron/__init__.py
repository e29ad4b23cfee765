"""Perron: equilibrium networks whose fixed points come with a proof."""

from perron import activations, constraints, enclosure, kernels, nn, solvers
from perron.certificates import Certificate, certify
from perron.kernels import compile_explicit
from perron.solvers import Auto, ConvergenceError, ConvergenceWarning, Picard, Solution

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Certificate",
    "ConvergenceError",
    "ConvergenceWarning",
    "Picard",
    "Solution",
    "activations",
    "certify",
    "compile_explicit",
    "constraints",
    "enclosure",
    "kernels",
    "nn",
    "solvers",
]
