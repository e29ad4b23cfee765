"""The network that a random nonnegative equilibrium layer is in the limit of its width: a diagnostic of trained ones.

Nonnegative weights are not centred, so the kernels of this package do not apply. With entries of order 1/m, W z is about
kappa M, M the mean entry of z and kappa the mean row sum of W: the equilibrium is an explicit layer act(kappa M + b) with one
scalar per sample, M = mean act(kappa M + b). The mean squared difference falls like 1/m at random initialisation; a
layer that stays near its mean field has not learnt to use its recurrent weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perron.activations import Activation
from perron.cells.activation import Activate
from perron.cells.chain import Chain
from perron.cells.injection import Inject
from perron.cells.low_rank import DiagonalLowRank
from perron.cells.opaque import Opaque
from perron.cells.trace import as_map
from perron.nn import Equilibrium

__all__ = ["MeanField", "mean_field"]


@dataclass(frozen=True, kw_only=True)
class MeanField:
    """Of a layer on a batch; float64.

    Attributes:
        value: (batch, m) act(kappa M + b).
        mean: (batch,) M.
        gain: kappa.
        distance: (batch,) |z - value|/|z|, z the layer's own equilibrium.
    """

    value: Tensor
    mean: Tensor
    gain: float
    distance: Tensor


@torch.no_grad()
def mean_field(layer: Equilibrium, x: Tensor) -> MeanField:
    """How far the equilibria of a nonnegative layer are from those of a mean field with its mean row sum.

    Args:
        layer: of the form z = act(W z + b), W >= 0 and dense, for instance `PositiveConcaveLinear`.
        x: its input.

    Raises:
        ValueError: the layer has another form, or W has a negative entry.

    >>> from perron.nn import PositiveConcaveLinear
    >>> layer = PositiveConcaveLinear(4, 400)
    >>> bool((mean_field(layer, torch.randn(3, 4)).distance < 0.1).all())
    True
    """
    parts = _parts(as_map(layer.cell)[0])
    if parts is None or bool((parts[0] < 0).any()):
        raise ValueError(
            "a mean field needs a cell act(W z + b) with a dense W that is nowhere negative; a centred Gaussian layer has "
            "kernels instead (perron.infinite_width.implicit_kernels)"
        )
    weight, bias, sigma = parts
    m = len(weight)
    own = layer.solve(x).value.double()
    gain = float(weight.double().sum(1).mean())
    field = DiagonalLowRank(m, 1, dtype=torch.float64, device=weight.device)
    for tensor, entry in ((field.diagonal, 0.0), (field.left, gain / m), (field.right, 1.0)):
        tensor.fill_(entry)
    injection = layer.injected(x).double() + (0.0 if bias is None else bias.double())
    network = Equilibrium(nn.Sequential(field, Inject(), Activate(sigma)), injection="given")
    value = network(injection)
    return MeanField(value=value, mean=value.mean(1), gain=gain, distance=(own - value).norm(dim=1) / own.norm(dim=1))


def _parts(map: Chain | Opaque) -> tuple[Tensor, Tensor | None, Activation] | None:
    """W, c and act of a cell act(W z + c + b) with a dense W."""
    if not isinstance(map, Chain) or len(map.steps) != 3 or not map.steps[1].injects or len(map.affine) != 1:
        return None
    (affine,), sigma = map.affine, map.last_activation
    weight = affine.matrix()
    return None if weight is None or sigma is None else (weight, affine.bias, sigma)
