"""Cells f(z; b) as steps: one file a step, its module beside it."""

from perron.cells.activation import Activate, ActivationStep
from perron.cells.affine import AffineStep
from perron.cells.chain import Chain
from perron.cells.circular import MonotoneConvolution2d, MonotoneConvolutionStep
from perron.cells.clamp import Clamp, ClampStep
from perron.cells.convolution import ConvolutionStep
from perron.cells.dense import DenseStep
from perron.cells.dropout import MaskStep, VariationalDropout
from perron.cells.injection import Inject, InjectStep
from perron.cells.jacobian import AutomaticLinearization, Jacobian
from perron.cells.low_rank import DiagonalLowRank, DiagonalLowRankStep
from perron.cells.map import Linearization, Map
from perron.cells.normalization import Normalize, NormalizeStep
from perron.cells.opaque import OneSystem, Opaque, as_cell
from perron.cells.pooling import PoolStep
from perron.cells.refusal import Refusal
from perron.cells.sparse import SparseLinear, SparsePattern, SparseStep
from perron.cells.step import Step
from perron.cells.trace import affine_step, as_map, trace

__all__ = [
    "Activate",
    "ActivationStep",
    "AffineStep",
    "AutomaticLinearization",
    "Chain",
    "Clamp",
    "ClampStep",
    "ConvolutionStep",
    "DenseStep",
    "DiagonalLowRank",
    "DiagonalLowRankStep",
    "Inject",
    "InjectStep",
    "Jacobian",
    "Linearization",
    "Map",
    "MaskStep",
    "MonotoneConvolution2d",
    "MonotoneConvolutionStep",
    "Normalize",
    "NormalizeStep",
    "OneSystem",
    "Opaque",
    "PoolStep",
    "Refusal",
    "SparseLinear",
    "SparsePattern",
    "SparseStep",
    "Step",
    "VariationalDropout",
    "affine_step",
    "as_cell",
    "as_map",
    "trace",
]
