"""Reference networks, one file a family."""

from perron.models.positive_concave import PRESETS, PositiveConcaveConvNet, PositiveConcaveLinearNet
from perron.models.rivals import CORES, RivalNet, matched_width, parameter_count

__all__ = [
    "CORES",
    "PRESETS",
    "PositiveConcaveConvNet",
    "PositiveConcaveLinearNet",
    "RivalNet",
    "matched_width",
    "parameter_count",
]
