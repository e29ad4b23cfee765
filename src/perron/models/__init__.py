"""Reference networks, one file a family."""

from perron.models.positive_concave import PRESETS, PositiveConcaveConvNet, PositiveConcaveLinearNet

__all__ = ["PRESETS", "PositiveConcaveConvNet", "PositiveConcaveLinearNet"]
