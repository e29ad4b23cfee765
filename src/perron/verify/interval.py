"""Bounds through a whole network, each equilibrium layer replaced by everything its proof leaves open.

Affine modules act on centre and radius, nondecreasing ones on both ends. The fixed point of a positive concave layer does
not decrease with b, so a box of injections gives exactly the box [z*(b_lo), z*(b_hi)]: two certified solves. That of a
contracting layer depends on b continuously, with a constant that the contraction factor gives: one certified solve at the
centre, widened. Everything runs in float64 and every radius is enlarged by a bound on the rounding of its own computation.
What is bounded is the network in exact arithmetic, with the weights it has; running it in float32 adds the rounding of
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._numerics.batch import amax, amin, euclidean, per_sample
from perron._numerics.rounding import gamma
from perron.cells import reading
from perron.cells.activation import ACTIVATION_MODULES, Activate, ActivationStep, activation_of
from perron.cells.chain import Chain
from perron.cells.dropout import does_nothing
from perron.cells.injection import InjectStep
from perron.cells.normalization import NormalizeStep
from perron.cells.step import AffineStep, Refusal, check_rounding
from perron.cells.trace import AFFINE_MODULES, affine_step, trace
from perron.nn import Equilibrium, GraphEquilibrium
from perron.nn.equilibrium import Injection, positive_injection
from perron.solvers import Auto, FixedPointProblem
from perron.theory.certificate import Certificate
from perron.theory.contraction import activation_degree, gain
from perron.theory.monotone_operator import margin

__all__ = ["ClassCertificate", "Interval", "certify_classes", "propagate"]

DTYPE = torch.float64
_TINY = torch.finfo(DTYPE).tiny
_U = 2.0**-53


@dataclass(frozen=True)
class Interval:
    """A box, entrywise `lower <= value <= upper`, (batch, ...); where an end is NaN nothing is known of the value."""

    lower: Tensor
    upper: Tensor


def _affine(module: nn.Module, path: str, box: Interval) -> Interval:
    rigorous = Chain((affine_step(module),)).to(DTYPE).rigorous()
    if rigorous is None:
        raise Refusal(f"the sums of {path} cannot be bounded on {box.lower.device}")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and box.lower.dim() != 2 + len(module.kernel_size):
        raise ValueError(f"{path} takes (batch, channels, *{len(module.kernel_size)}), got {tuple(box.lower.shape)}")
    (step,) = rigorous.affine
    return Interval(*step.over(box.lower, box.upper))


def _widened(low: Tensor, high: Tensor, relative: float) -> Interval:
    """The ends moved outwards by their rounding, which is that much of them but for underflow."""
    return Interval(low - relative * low.abs() - _TINY, high + relative * high.abs() + _TINY)


def _centre(box: Interval) -> tuple[Tensor, Tensor]:
    """c and r with |v - c| <= r for every v of the box: r is the exact distance of an end but for one rounding."""
    centre = box.lower / 2 + box.upper / 2
    radius = torch.maximum(box.upper - centre, centre - box.lower)
    return centre, radius * (1 + 4 * _U)


def _batch_norm(module: nn.BatchNorm1d, path: str, box: Interval) -> Interval:
    """s (v - mean) + bias with s = weight/sqrt(var + eps), on centre and radius.

    Three roundings make s, three more (c - mean) s + bias, and two the ends: 8 u (|s| (|c| + r + |mean|) + |bias|).
    """
    mean, var = module.running_mean, module.running_var
    if module.training or mean is None or var is None:
        raise Refusal(
            f"{path} normalises by the statistics of its batch; call model.eval(), and keep running statistics"
        )
    module._check_input_dim(box.lower)
    if box.lower.shape[1] != module.num_features:
        raise ValueError(f"{path} takes {module.num_features} features, got {tuple(box.lower.shape)}")
    mean, var = mean.to(DTYPE), var.to(DTYPE)
    if not bool(((var >= 0) & (var + module.eps > 0) & var.isfinite() & mean.isfinite()).all()):
        raise Refusal(
            f"{path} has a running variance that is negative, or zero without eps, or statistics that are not finite"
        )
    shape = (1, -1, *[1] * (box.lower.dim() - 2))
    scale = torch.ones_like(var) if module.weight is None else module.weight.to(DTYPE)
    scale = (scale / torch.sqrt(var + module.eps)).reshape(shape)
    bias = torch.zeros_like(mean) if module.bias is None else module.bias.to(DTYPE)
    mean, bias = mean.reshape(shape), bias.reshape(shape)
    centre, radius = _centre(box)
    middle = (centre - mean) * scale + bias
    size = (centre.abs() + radius + mean.abs()) * scale.abs() + bias.abs()
    spread = radius * scale.abs() + 2 * gamma(8, DTYPE) * size + _TINY
    return Interval(middle - spread, middle + spread)


# ------------------------------------------------------------------------------------------------------ entry by entry


def _activation(module: nn.Module, path: str, box: Interval) -> Interval:
    activation = activation_of(module, type(module), path)
    assert activation is not None
    return Interval(*activation.over(box.lower, box.upper))


def _leaky_relu(module: nn.LeakyReLU, path: str, box: Interval) -> Interval:
    if not 0 <= module.negative_slope < torch.inf:
        raise Refusal(f"{path} has the negative slope {module.negative_slope}, with which it is not nondecreasing")
    low, high = (F.leaky_relu(end, module.negative_slope) for end in (box.lower, box.upper))
    return _widened(low, high, 4 * _U)


def _softplus(module: nn.Softplus, path: str, box: Interval) -> Interval:
    """s(v) = log(1 + exp(beta v))/beta where beta v <= threshold, and v beyond, which is less.

    There s(v) - v = log(1 + exp(-beta v))/beta falls with v, so the gap is at most that at the threshold.
    """
    beta, threshold = float(module.beta), float(module.threshold)
    if not 0 < beta < torch.inf or not abs(threshold) < torch.inf:
        raise Refusal(f"{path} has beta {beta} and threshold {threshold}, with which it is not bounded here")
    zero = torch.zeros((), dtype=DTYPE, device=box.lower.device)
    low, high = (torch.logaddexp(beta * end, zero) / beta for end in (box.lower, box.upper))
    gap = float(torch.logaddexp(zero - threshold, zero)) / beta * (1 + 1e-12) + _TINY
    # At the threshold it is rounding that decides.
    low = torch.where(beta * box.upper >= threshold - 4 * _U * abs(threshold), low - gap, low)
    # The rounding of beta v, down to -745, is relative to exp(beta v).
    return _widened(low, high, 1024 * _U)


# ------------------------------------------------------------------------------------------------------------- shapes


def _both_ends(module: nn.Module, path: str, box: Interval) -> Interval:
    """A module that picks entries, or the largest of some, and computes nothing."""
    return Interval(module(box.lower), module(box.upper))


def _max_pool(module: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, path: str, box: Interval) -> Interval:
    if module.return_indices:
        raise Refusal(f"{path} returns indices, too, and they have no bounds")
    return _both_ends(module, path, box)


def _flatten(module: nn.Flatten, path: str, box: Interval) -> Interval:
    if module.start_dim % box.lower.dim() == 0:
        raise Refusal(f"{path} flattens the batch; use start_dim=1")
    return _both_ends(module, path, box)


def _unflatten(module: nn.Unflatten, path: str, box: Interval) -> Interval:
    if isinstance(module.dim, str) or module.dim % box.lower.dim() == 0:
        raise Refusal(f"{path} unflattens the batch, or a named dimension; use dim=1")
    return _both_ends(module, path, box)


# -------------------------------------------------------------------------------------------------------- equilibria


def _equilibrium(layer: Equilibrium, path: str, box: Interval) -> Interval:
    try:
        map, reason = trace(layer.cell, f"{path}[cell]"), None
        certificate, positive = layer.derive(map, None)
        reason = certificate.refusal
    except Refusal as refusal:
        reason = str(refusal)
    if reason is not None:
        raise Refusal(f"the equilibrium layer {path} is not certified: {reason}")
    if map.per_sample:
        raise Refusal(f"dropout in {path}[cell] makes another map of every sample in training mode; call model.eval()")
    if (inner := getattr(layer, "input", None)) is not None:
        box = _propagate(inner, f"{path}[input]", box)
    injections = _injections(layer.injection, box)
    solver = Auto(tol=min(layer.solver.tol, 1e-4), max_steps=2000, proof_dtype=DTYPE, on_failure="ignore")
    if certificate.kind in ("positive concave", "subhomogeneous"):
        injections = _within_domain(injections, positive)
    if certificate.kind == "positive concave":
        return _between_ends(map.to(DTYPE), injections, solver)
    return _around_centre(map.to(DTYPE), certificate, injections, solver)


def _injections(injection: Injection, box: Interval) -> Interval:
    """softplus and relu are nondecreasing; relu computes nothing.

    The rounding of softplus is that of 5 v, down to -84 where the floor is, relative to exp(5 v), and of a few more.
    """
    low, high = (positive_injection(end, injection) for end in (box.lower, box.upper))
    return _widened(low, high, 128 * _U) if injection == "softplus" else Interval(low, high)


def _within_domain(b: Interval, positive: bool) -> Interval:
    """NaN for samples with injections that are negative, or where the proof needs positive ones not positive."""
    least = amin(b.lower)
    return Interval(
        torch.where(per_sample(least > 0 if positive else least >= 0, b.lower), b.lower, torch.nan), b.upper
    )


def _between_ends(chain: Chain, b: Interval, solver: Auto) -> Interval:
    """f grows with z and b, so z* grows with b: z*(b) lies between the lower bound of z*(b_lo) and the upper of z*(b_hi)."""
    low, high = (solver.solve(FixedPointProblem(chain, end, proven=True)) for end in (b.lower, b.upper))
    assert low.lower is not None
    assert high.upper is not None
    proven = per_sample(low.error_bound.isfinite() & high.error_bound.isfinite(), low.lower)
    return Interval(torch.where(proven, low.lower, torch.nan), torch.where(proven, high.upper, torch.nan))


def _around_centre(chain: Chain, certificate: Certificate, b: Interval, solver: Auto) -> Interval:
    """From the enclosure at the centre c: how far z*(b) can be from z*(c) for |b - c| <= r.

    With d a distance, q < 1 the factor of F in it and D >= d(F(z; b), F(z; c)) for every z,
    d(z*(b), z*(c)) <= q d(z*(b), z*(c)) + D, so at most D/(1 - q):

    * bounded gain: the sup norm, and D = L max r with the gain L of what follows the injection;
    * subhomogeneous of degree mu: Thompson's metric, q = mu, and D of `_thompson_distance`.

    Monotone: m |z*(b) - z*(c)|^2 <= <b - c, z*(b) - z*(c)>, so at most |r|/m in the Euclidean norm.
    """
    centre, radius = _centre(b)
    solution = solver.solve(FixedPointProblem(chain, centre, contracts=True))
    if solution.lower is None or solution.upper is None:
        return Interval(torch.full_like(centre, torch.nan), torch.full_like(centre, torch.nan))
    low, high = solution.lower, solution.upper
    if certificate.kind == "subhomogeneous":
        assert certificate.rate is not None
        # The quotients and logarithms in D are exact to 1e-12, absolutely.
        apart = (_thompson_distance(chain, b, centre) + 1e-12) / (1 - certificate.rate) * (1 + 1e-12)
        factor = per_sample(torch.exp(apart) * (1 + 1e-12), low)
        box = Interval(low / factor, high * factor + _TINY)
    else:
        reach = per_sample(_shift(chain, certificate, radius), low)
        box = _widened(low - reach, high + reach, 4 * _U)
    proven = per_sample(solution.proven, low) & box.lower.isfinite() & box.upper.isfinite()
    return Interval(torch.where(proven, box.lower, torch.nan), torch.where(proven, box.upper, torch.nan))


def _behind_injection(chain: Chain) -> tuple[int, Chain]:
    """The place of the injection, and what follows it."""
    place = [isinstance(s, InjectStep) for s in chain.steps].index(True)
    return place, Chain(chain.steps[place + 1 :])


def _shift(chain: Chain, certificate: Certificate, radius: Tensor) -> Tensor:
    """(batch,) how far the fixed point moves, in every entry, while b does by at most `radius`."""
    if certificate.kind == "monotone operator":
        return euclidean(radius) / margin(chain) * (1 + gamma(radius[:1].numel() + 16, DTYPE))
    assert certificate.kind == "bounded gain"
    assert certificate.rate is not None
    return gain(_behind_injection(chain)[1]) * amax(radius) / (1 - certificate.rate) * (1 + 8 * _U)


def _thompson_distance(chain: Chain, b: Interval, centre: Tensor) -> Tensor:
    """(batch,) between F(z; b) and F(z; centre), whatever z > 0 and b >= 0 in the box are.

    Affine steps with nonnegative entries do not enlarge it, activations multiply it by their degree, and division by a norm
    at most doubles it: d(x/|x|, y/|y|) <= d(x, y) + |log(|x|/|y|)|.
    """
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
        elif not isinstance(step, AffineStep):
            raise Refusal(f"what a {type(step).__name__} does to distances is not known")
    return apart


# ----------------------------------------------------------------------------------------------------------- networks


_RULES: dict[type[nn.Module], Callable[[Any, str, Interval], Interval]] = {
    **dict.fromkeys(AFFINE_MODULES, _affine),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((*ACTIVATION_MODULES, Activate), _activation),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys(reading.LAYERS - {GraphEquilibrium}, _equilibrium),
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.LeakyReLU: _leaky_relu,
    nn.Softplus: _softplus,
}


@torch.no_grad()
def propagate(module: nn.Module, box: Interval) -> Interval:
    """Bounds of `module` over the box, in float64; NaN where nothing could be bounded.

    Nothing is known of an entry that is NaN, so nothing follows for what depends on it; nor for a sample for which an
    equilibrium could not be enclosed.

    Args:
        module: `nn.Sequential`, or a network of `perron.models`, of affine and pooling modules, batch normalisation and
            dropout in evaluation mode, nondecreasing activations, and certified equilibrium layers.
        box: (batch, ...) floating-point ends, lower <= upper, which may be infinite.

    Raises:
        Refusal: a module is of a kind whose bounds are not known here, or carries hooks or replaced methods, or an
            equilibrium layer has no certificate; the message names its path.
        ValueError: the ends are not floating point, have different shapes or no batch dimension, or lower > upper
            somewhere; or the box does not fit the module.

    >>> box = propagate(nn.ReLU(), Interval(torch.tensor([[-1.0, 1.0]]), torch.tensor([[0.5, 2.0]])))
    >>> box.upper.round(decimals=6)
    tensor([[0.5000, 2.0000]], dtype=torch.float64)
    """
    lower, upper = box.lower, box.upper
    if lower.shape != upper.shape or lower.dim() < 2:
        raise ValueError(
            f"both ends of a box must be (batch, ...) of one shape, got {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    if not (lower.is_floating_point() and upper.is_floating_point()):
        raise ValueError(f"both ends of a box must be floating point, got {lower.dtype} and {upper.dtype}")
    if bool((inverted := lower.to(DTYPE) > upper.to(DTYPE)).any()):
        where = inverted.nonzero()[0].tolist()
        raise ValueError(f"the box is empty: {lower[tuple(where)]} > {upper[tuple(where)]} at index {where}")
    check_rounding()
    with reading.without_autocast():
        reading.read_twice(module)
        return _propagate(module, reading.name_of(module), Interval(lower.to(DTYPE), upper.to(DTYPE)))


def _propagate(module: nn.Module, path: str, box: Interval) -> Interval:
    kind = reading.kind(module, path)
    if kind in reading.CONTAINERS:
        for where, child in reading.children(module, path):
            box = _propagate(child, where, box)
        return box
    if does_nothing(module, kind, path):
        return box
    if kind not in _RULES:
        raise reading.unknown(kind, path, "an affine, pooling, normalising, nondecreasing or equilibrium module")
    return _RULES[kind](module, path, box)


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
        model: a network in eval mode, of modules known to `propagate`.
        x: (batch, ...) inputs, taken as exact.

    Raises:
        Refusal: see `propagate`; also for a model of which some module is in training mode.
        ValueError: see `propagate`; also for logits that are not (batch, classes).
    """
    for name, module in model.named_modules():
        if module.training:
            raise Refusal(f"{reading.path_of(model, name)} is in training mode; call model.eval() first")
    # A copy: modules may work in place.
    logits = model(x.clone())
    box = propagate(model, Interval(x, x))
    if logits.dim() != 2 or logits.shape != box.lower.shape:
        raise ValueError(f"logits must be (batch, classes), got {tuple(logits.shape)}")
    predicted = logits.argmax(1)
    own = F.one_hot(predicted, box.lower.shape[1]).bool()
    others = box.upper.masked_fill(own, -torch.inf).amax(1)
    margin = box.lower.gather(1, predicted[:, None])[:, 0] - others
    # NaN (no enclosure) compares false.
    return ClassCertificate(predicted, margin > 0, margin)
