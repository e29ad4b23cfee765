"""Bounds through a whole network, each equilibrium layer replaced by everything its proof leaves open.

Affine modules act on centre and radius, monotone ones on both ends. The fixed point of a positive concave layer is monotone
in b, so a box of injections gives exactly the box [z*(b_lo), z*(b_hi)]: two certified solves. That of a contracting layer
depends on b continuously, with a constant that the contraction factor gives: one certified solve at the centre, widened.
Everything runs in float64 and every radius is enlarged by a bound on the rounding of its own computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._batch import amax, amin, per_sample
from perron.affine import AFFINE_MODULES, Refusal, affine_step
from perron.cells import ActivationStep, Chain, InjectStep, NormalizeStep, as_map
from perron.certificates import Certificate
from perron.contraction import activation_degree, gain
from perron.monotone import margin
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
    assert isinstance(map, Chain)
    if map.per_sample:
        raise Refusal(
            "dropout inside a cell makes another map of every sample in training mode; call model.eval() first"
        )
    inner = getattr(layer, "input", None)
    injections = _injections(layer, box if inner is None else _affine(inner, box))
    solver = Auto(tol=min(layer.solver.tol, 1e-4), max_steps=2000, verify=DTYPE, on_failure="ignore")
    if certificate.kind == "positive concave":
        return _between_ends(map.to(DTYPE), injections, solver)
    return _around_centre(map.to(DTYPE), certificate, injections, solver)


def _injections(layer: Equilibrium, box: Interval) -> Interval:
    """softplus and relu are monotone; both ends are widened by their rounding. NaN outside of what the layer accepts."""
    slack = 64 * gamma(8, DTYPE)
    low, high = layer.positive(box.lower), layer.positive(box.upper)
    if layer.injection == "given":
        low = torch.where(per_sample(amin(low) >= 0, low), low, torch.nan)
    return Interval(low - slack * low.abs(), high + slack * high.abs())


def _between_ends(chain: Chain, b: Interval, solver: Auto) -> Interval:
    low, high = (solver.solve(FixedPointProblem(chain, end, proven=True)) for end in (b.lower, b.upper))
    assert low.lower is not None
    assert high.upper is not None
    proven = per_sample(low.error_bound.isfinite() & high.error_bound.isfinite(), low.lower)
    return Interval(torch.where(proven, low.lower, torch.nan), torch.where(proven, high.upper, torch.nan))


def _around_centre(chain: Chain, certificate: Certificate, b: Interval, solver: Auto) -> Interval:
    """From the enclosure at the centre c: how far z*(b) can be from z*(c) for |b - c| <= r.

    * monotone: m |z*(b) - z*(c)|^2 <= <b - c, z*(b) - z*(c)>, so at most |r|/m in the Euclidean norm;
    * bounded gain q, and L behind the injection: at most L max r/(1 - q) in the sup norm;
    * subhomogeneous of degree mu: at most D/(1 - mu) in Thompson's metric, D between F(z; b) and F(z; c).
    """
    centre, radius = _centre(b)
    solution = solver.solve(FixedPointProblem(chain, centre, contracts=True))
    if solution.lower is None or solution.upper is None:
        return Interval(torch.full_like(centre, torch.nan), torch.full_like(centre, torch.nan))
    low, high = solution.lower, solution.upper
    if certificate.kind == "subhomogeneous":
        assert certificate.rate is not None
        apart = _thompson_distance(chain, b, centre) / (1 - certificate.rate) * (1 + 1e-9) + 1e-12
        factor = per_sample(torch.exp(apart) * (1 + 1e-12), low)
        box = Interval(low / factor, high * factor)
    else:
        reach = per_sample(_shift(chain, certificate, radius) * (1 + 1e-9), low)
        box = Interval(low - reach - 1e-12 * low.abs(), high + reach + 1e-12 * high.abs())
    proven = per_sample(solution.proven, low) & box.lower.isfinite() & box.upper.isfinite()
    return Interval(torch.where(proven, box.lower, torch.nan), torch.where(proven, box.upper, torch.nan))


def _behind_injection(chain: Chain) -> tuple[int, Chain]:
    """The place of the injection, and what follows it."""
    place = [isinstance(s, InjectStep) for s in chain.steps].index(True)
    return place, Chain(chain.steps[place + 1 :])


def _shift(chain: Chain, certificate: Certificate, radius: Tensor) -> Tensor:
    """(batch,) how far the fixed point moves while b does by at most `radius`."""
    if certificate.kind == "monotone":
        return radius.flatten(1).norm(dim=1) / margin(chain)
    assert certificate.rate is not None
    return gain(_behind_injection(chain)[1]) * amax(radius) / (1 - certificate.rate)


def _thompson_distance(chain: Chain, b: Interval, centre: Tensor) -> Tensor:
    """(batch,) between F(z; b) and F(z; centre), whatever z > 0 and b in the box are."""
    place, rest = _behind_injection(chain)
    before = chain.steps[place - 1] if place else None
    # v + b and v + c are farthest apart, as ratios, where v is least.
    least = before.activation.at_zero * (1 - 1e-12) if isinstance(before, ActivationStep) else 0.0
    up, down = (least + b.upper) / (least + centre), (least + centre) / (least + b.lower)
    apart = amax(torch.log(torch.maximum(up, down)))
    for step in rest.steps:
        if isinstance(step, ActivationStep):
            apart = apart * min(activation_degree(step.activation), 1.0)
        elif isinstance(step, NormalizeStep):
            apart = apart * 2
    return apart


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
