"""Equilibrium layers, and the modules their cells are made of."""

from perron.cells import reading
from perron.cells.activation import Activate
from perron.cells.circular import MonotoneConvolution2d
from perron.cells.clamp import Clamp
from perron.cells.dropout import VariationalDropout
from perron.cells.injection import Inject
from perron.cells.low_rank import DiagonalLowRank
from perron.cells.normalization import Normalize
from perron.cells.sparse import SparseLinear
from perron.nn import penalties
from perron.nn.equilibrium import Equilibrium
from perron.nn.graph import GraphEquilibrium
from perron.nn.monotone import MonotoneConv2d, MonotoneLinear
from perron.nn.ode import NeuralODE
from perron.nn.positive_concave import (
    PositiveConcaveConv1d,
    PositiveConcaveConv2d,
    PositiveConcaveConv3d,
    PositiveConcaveLinear,
)
from perron.nn.subhomogeneous import (
    SubhomogeneousConv1d,
    SubhomogeneousConv2d,
    SubhomogeneousConv3d,
    SubhomogeneousLinear,
)
from perron.nn.unconstrained import UnconstrainedConv2d, UnconstrainedLinear

reading.layers(
    Equilibrium,
    GraphEquilibrium,
    MonotoneConv2d,
    MonotoneLinear,
    PositiveConcaveConv1d,
    PositiveConcaveConv2d,
    PositiveConcaveConv3d,
    PositiveConcaveLinear,
    SubhomogeneousConv1d,
    SubhomogeneousConv2d,
    SubhomogeneousConv3d,
    SubhomogeneousLinear,
    UnconstrainedConv2d,
    UnconstrainedLinear,
)

__all__ = [
    "Activate",
    "Clamp",
    "DiagonalLowRank",
    "Equilibrium",
    "GraphEquilibrium",
    "Inject",
    "MonotoneConv2d",
    "MonotoneConvolution2d",
    "MonotoneLinear",
    "NeuralODE",
    "Normalize",
    "PositiveConcaveConv1d",
    "PositiveConcaveConv2d",
    "PositiveConcaveConv3d",
    "PositiveConcaveLinear",
    "SparseLinear",
    "SubhomogeneousConv1d",
    "SubhomogeneousConv2d",
    "SubhomogeneousConv3d",
    "SubhomogeneousLinear",
    "UnconstrainedConv2d",
    "UnconstrainedLinear",
    "VariationalDropout",
    "penalties",
]
