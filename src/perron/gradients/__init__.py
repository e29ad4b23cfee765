"""Derivatives of fixed points, one file a method."""

from perron.gradients.base import Call, Gradient
from perron.gradients.implicit import Implicit
from perron.gradients.jacobian_free import JacobianFree
from perron.gradients.phantom import Phantom

__all__ = ["Call", "Gradient", "Implicit", "JacobianFree", "Phantom"]
