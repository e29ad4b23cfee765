"""Bounds through a whole network, each equilibrium layer replaced by everything its proof leaves open.

Affine modules act on centre and radius, monotone ones on both ends. For an equilibrium layer the fixed point is monotone
in b, so a box of injections gives exactly the box [z*(b_lo), z*(b_hi)]: two certified solves. Everything runs in float64
and every radius is enlarged by a bound on the rounding of its own computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._batch import per_sample
from perron.affine import AFFINE_MODULES, Refusal, affine_step
from perron.cells import Chain, as_map
from perron.nn import Equilibrium
from perron.rounding import gamma
from perron.solvers import Auto, FixedPointProblem

__all__ = ["ClassCertificate", "Interval", "certify_classes", "propagate"]

DTYPE = torch.float64
_MONOTONE = (nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.ReLU, nn.Identity)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Interval:
    """A box, entrywise `lower <= value <= upper`, (batch, ...) float64."""

    lower: Tensor
    upper: Tensor


def _affine(module: nn.Module, box: Interval) -> Interval:
    (step,) = Chain((affine_step(module),)).to(DTYPE).affine
    return Interval(*step.over(box.lower, box.upper))


def _centre(box: Interval) -> tuple[Tensor, Tensor]:
    centre = (box.lower + box.upper) / 2
    # Rounded up: the box must stay inside centre +/- radius.
    radius = torch.maximum(box.upper - centre, centre - box.lower) * (1 + 1e-15)
    return centre, radius


def _batch_norm(module: nn.Module, box: Interval) -> Interval:
    if module.training or module.running_var is None:
        raise Refusal("batch normalisation depends on the batch in training mode; call model.eval() first")
    shape = (1, -1, *[1] * (box.lower.dim() - 2))
    scale = 1 / torch.sqrt(module.running_var.to(DTYPE) + module.eps)  # type: ignore[operator]
    if module.weight is not None:
        scale = scale * module.weight.to(DTYPE)  # type: ignore[operator]
    shift = -module.running_mean.to(DTYPE) * scale  # type: ignore[operator, union-attr]
    size = shift.abs()
    if module.bias is not None:
        shift, size = shift + module.bias.to(DTYPE), size + module.bias.to(DTYPE).abs()  # type: ignore[operator]
    scale, shift, size = scale.reshape(shape), shift.reshape(shape), size.reshape(shape)
    centre, radius = _centre(box)
    middle = centre * scale + shift
    spread = radius * scale.abs() + 32 * gamma(4, DTYPE) * ((centre.abs() + radius) * scale.abs() + size)
    return Interval(middle - spread, middle + spread)


def _equilibrium(layer: Equilibrium, box: Interval) -> Interval:
    map, reason = as_map(layer.cell)
    certificate, _ = layer.derive(map, reason)
    if not certificate:
        raise Refusal(f"an equilibrium layer is not certified: {certificate.refusal}")
    if certificate.kind != "positive concave" or not isinstance(map, Chain):
        raise Refusal(
            f"bounds over a box of inputs are known for positive concave layers, not for {certificate.kind} ones"
        )
    inner = getattr(layer, "input", None)
    if inner is not None:
        box = _affine(inner, box)
    # softplus and relu are monotone; both ends are widened by their rounding.
    slack = 64 * gamma(8, DTYPE)
    solver = Auto(tol=min(layer.solver.tol, 1e-4), max_steps=2000, verify=DTYPE, on_failure="ignore")
    ends = [layer.positive(box.lower) * (1 - slack), layer.positive(box.upper) * (1 + slack)]
    low, high = (solver.solve(FixedPointProblem(map.to(DTYPE), b, proven=True)) for b in ends)
    assert low.lower is not None
    assert high.upper is not None
    proven = per_sample(low.error_bound.isfinite() & high.error_bound.isfinite(), low.lower)
    return Interval(torch.where(proven, low.lower, torch.nan), torch.where(proven, high.upper, torch.nan))


def _pooled(module: nn.Module, box: Interval) -> Interval:
    return Interval(module(box.lower), module(box.upper))


@torch.no_grad()
def propagate(module: nn.Module, box: Interval) -> Interval:
    """Bounds of `module` over the box, in float64; NaN for samples where an equilibrium could not be enclosed.

    Raises:
        Refusal: a module is of a kind whose bounds are not known here, or an equilibrium layer has no certificate.
    """
    return _propagate(module, Interval(box.lower.to(DTYPE), box.upper.to(DTYPE)))


def _propagate(module: nn.Module, box: Interval) -> Interval:
    if isinstance(module, nn.Sequential):
        for child in module:
            box = _propagate(child, box)
        return box
    rules: list[tuple[Any, Callable[..., Interval]]] = [
        (Equilibrium, _equilibrium),
        (tuple(AFFINE_MODULES), _affine),
        (_NORMS, _batch_norm),
        (_MONOTONE, _pooled),
    ]
    for kinds, rule in rules:
        if isinstance(module, kinds):
            return rule(module, box)
    raise Refusal(
        f"no bounds are known for {type(module).__name__}; certify a network of affine, pooling and equilibrium layers"
    )


@dataclass(frozen=True)
class ClassCertificate:
    """Per sample: the predicted class, and whether every point of the enclosures gives the same one.

    Attributes:
        predicted: (batch,) class of the network as it runs.
        constant: (batch,) proven to be the class over the whole enclosure.
        margin: (batch,) lower bound of the predicted logit minus the largest upper bound of the others.
    """

    predicted: Tensor
    constant: Tensor
    margin: Tensor


@torch.no_grad()
def certify_classes(model: nn.Module, x: Tensor) -> ClassCertificate:
    """Whether the class of every sample is the same over the verified enclosure of every equilibrium layer.

    Args:
        model: a network in eval mode, `nn.Sequential` of layers known to `propagate`.
        x: (batch, ...) inputs, taken as exact.

    Raises:
        Refusal: see `propagate`; also for a model in training mode.
    """
    if model.training:
        raise Refusal("the model is in training mode; call model.eval() first")
    predicted = model(x).argmax(1)
    box = propagate(model, Interval(x, x))
    own = F.one_hot(predicted, box.lower.shape[1]).bool()
    others = box.upper.masked_fill(own, -torch.inf).amax(1)
    margin = box.lower.gather(1, predicted[:, None])[:, 0] - others
    # NaN (no enclosure) compares false.
    return ClassCertificate(predicted, margin > 0, margin)
