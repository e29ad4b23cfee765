"""What is proven of fixed points: one file a theory."""

from perron.theory.base import Enclosure, Facts, Near, Sign, Theory
from perron.theory.certificate import Certificate
from perron.theory.certify import Derived, certify, derive, pose
from perron.theory.contracting import Contracting
from perron.theory.contraction import BoundedGain, gain
from perron.theory.enclose import enclose
from perron.theory.monotone_operator import MonotoneOperator, margin
from perron.theory.positive_concave import PositiveConcave, spectral_radius_bound
from perron.theory.thompson import Thompson, activation_degree, degree

__all__ = [
    "BoundedGain",
    "Certificate",
    "Contracting",
    "Derived",
    "Enclosure",
    "Facts",
    "MonotoneOperator",
    "Near",
    "PositiveConcave",
    "Sign",
    "Theory",
    "Thompson",
    "activation_degree",
    "certify",
    "degree",
    "derive",
    "enclose",
    "gain",
    "margin",
    "pose",
    "spectral_radius_bound",
]
