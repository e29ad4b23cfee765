"""Reference networks, one file a family."""

from perron.models.baselines import (
    CONVOLUTIONAL_CORES,
    CORES,
    BaselineConvNet,
    BaselineNet,
    matched_width,
    parameter_count,
)
from perron.models.positive_concave import PRESETS, PositiveConcaveConvNet, PositiveConcaveLinearNet
from perron.models.subhomogeneous import SubhomogeneousConvNet, SubhomogeneousLinearNet

__all__ = [
    "CONVOLUTIONAL_CORES",
    "CORES",
    "PRESETS",
    "PositiveConcaveConvNet",
    "PositiveConcaveLinearNet",
    "BaselineConvNet",
    "BaselineNet",
    "SubhomogeneousConvNet",
    "SubhomogeneousLinearNet",
    "matched_width",
    "parameter_count",
]
