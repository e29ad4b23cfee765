"""Derivatives of fixed points, one file a method."""

from perron.gradients.implicit import fixed_point
from perron.gradients.phantom import Phantom

__all__ = ["Phantom", "fixed_point"]
