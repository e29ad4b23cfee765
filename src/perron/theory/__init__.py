"""What is proven of fixed points: one file a theory."""

from perron.theory.certificate import Certificate
from perron.theory.certify import certify
from perron.theory.contraction import Contraction, activation_degree, contraction, degree, gain
from perron.theory.enclosure import Enclosure, enclose
from perron.theory.monotone_operator import Monotonicity, margin, monotonicity
from perron.theory.positive_concave import spectral_radius_bound

__all__ = [
    "Certificate",
    "Contraction",
    "Enclosure",
    "Monotonicity",
    "activation_degree",
    "certify",
    "contraction",
    "degree",
    "gain",
    "margin",
    "monotonicity",
    "spectral_radius_bound",
    "enclose",
]
