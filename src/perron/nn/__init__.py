"""Equilibrium layers, and the modules their cells are made of."""

from perron import reading
from perron.cells import Activate, Inject, Normalize, VariationalDropout
from perron.implicit import Phantom
from perron.nn import penalties
from perron.nn.equilibrium import Equilibrium
from perron.nn.graph import GraphEquilibrium
from perron.nn.monotone import MonotoneConv2d, MonotoneLinear
from perron.nn.ode import NeuralODE
from perron.nn.plain import PlainConv2d, PlainLinear
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
from perron.structured import DiagonalLowRank, MonotoneConvolution2d, SparseLinear

reading.layers(
    Equilibrium,
    GraphEquilibrium,
    MonotoneConv2d,
    MonotoneLinear,
    PlainConv2d,
    PlainLinear,
    PositiveConcaveConv1d,
    PositiveConcaveConv2d,
    PositiveConcaveConv3d,
    PositiveConcaveLinear,
    SubhomogeneousConv1d,
    SubhomogeneousConv2d,
    SubhomogeneousConv3d,
    SubhomogeneousLinear,
)

__all__ = [
    "Activate",
    "DiagonalLowRank",
    "Equilibrium",
    "GraphEquilibrium",
    "Inject",
    "MonotoneConv2d",
    "MonotoneConvolution2d",
    "MonotoneLinear",
    "NeuralODE",
    "Normalize",
    "Phantom",
    "PlainConv2d",
    "PlainLinear",
    "PositiveConcaveConv1d",
    "PositiveConcaveConv2d",
    "PositiveConcaveConv3d",
    "PositiveConcaveLinear",
    "SparseLinear",
    "SubhomogeneousConv1d",
    "SubhomogeneousConv2d",
    "SubhomogeneousConv3d",
    "SubhomogeneousLinear",
    "VariationalDropout",
    "penalties",
]
