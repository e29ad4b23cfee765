"""Perron: equilibrium networks whose fixed points come with a proof."""

from perron import activations, constraints, infinite_width, nn, solvers
from perron.infinite_width import compile_explicit
from perron.solvers import Auto, ConvergenceError, ConvergenceWarning, Picard, Solution
from perron.theory import enclosure
from perron.theory.certificate import Certificate
from perron.theory.certify import certify

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
    "infinite_width",
    "nn",
    "solvers",
]
