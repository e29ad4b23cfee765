"""Perron: equilibrium networks whose fixed points come with a proof."""

from perron import activations, constraints, gradients, infinite_width, nn, solvers
from perron.solution import Solution
from perron.solvers import Auto, ConvergenceError, ConvergenceWarning, Picard
from perron.theory import Certificate, certify, enclose

__version__ = "0.2.0"

__all__ = [
    "Auto",
    "Certificate",
    "ConvergenceError",
    "ConvergenceWarning",
    "Picard",
    "Solution",
    "activations",
    "certify",
    "constraints",
    "enclose",
    "gradients",
    "infinite_width",
    "nn",
    "solvers",
]
