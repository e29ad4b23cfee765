"""Reference networks, one file a family."""

from perron.models.positive_concave import PRESETS, PositiveConcaveConvNet, PositiveConcaveLinearNet
from perron.models.rivals import (
    CONVOLUTIONAL_CORES,
    CORES,
    RivalConvNet,
    RivalNet,
    matched_width,
    parameter_count,
)
from perron.models.subhomogeneous import SubhomogeneousConvNet, SubhomogeneousLinearNet

__all__ = [
    "CONVOLUTIONAL_CORES",
    "CORES",
    "PRESETS",
    "PositiveConcaveConvNet",
    "PositiveConcaveLinearNet",
    "RivalConvNet",
    "RivalNet",
    "SubhomogeneousConvNet",
    "SubhomogeneousLinearNet",
    "matched_width",
    "parameter_count",
]
