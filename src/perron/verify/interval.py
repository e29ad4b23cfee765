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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._numerics.batch import amin, per_sample
from perron._numerics.interval import Interval, centre_and_radius, widened
from perron._numerics.rounding import gamma
from perron.cells import reading
from perron.cells.chain import Chain
from perron.cells.dropout import VariationalDropout, does_nothing
from perron.cells.injection import Inject
from perron.cells.normalization import Normalize
from perron.cells.refusal import Refusal
from perron.cells.step import check_rounding
from perron.cells.trace import trace
from perron.nn import Equilibrium, GraphEquilibrium
from perron.nn.equilibrium import Injection, positive_injection
from perron.problem import FixedPointProblem
from perron.solvers import Auto
from perron.theory.base import Sign, Solved, Theory
from perron.theory.certify import pose

__all__ = ["ClassCertificate", "Interval", "certify_classes", "propagate"]

DTYPE = torch.float64
_TINY = torch.finfo(DTYPE).tiny
_U = 2.0**-53


def _step(module: nn.Module, path: str, box: Interval) -> Interval:
    """A module that is a step of cells as well."""
    rigorous = Chain((reading.step(module, path),)).to(DTYPE).rigorous()
    if rigorous is None:
        raise Refusal(f"the sums of {path} cannot be bounded on {box.lower.device}")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and box.lower.dim() != 2 + len(module.kernel_size):
        raise ValueError(f"{path} takes (batch, channels, *{len(module.kernel_size)}), got {tuple(box.lower.shape)}")
    return Interval(*rigorous.steps[0].propagate(box.lower, box.upper))


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
    centre, radius = centre_and_radius(box)
    middle = (centre - mean) * scale + bias
    size = (centre.abs() + radius + mean.abs()) * scale.abs() + bias.abs()
    spread = radius * scale.abs() + 2 * gamma(8, DTYPE) * size + _TINY
    return Interval(middle - spread, middle + spread)


# ------------------------------------------------------------------------------------------------------ entry by entry


def _leaky_relu(module: nn.LeakyReLU, path: str, box: Interval) -> Interval:
    if not 0 <= module.negative_slope < torch.inf:
        raise Refusal(f"{path} has the negative slope {module.negative_slope}, with which it is not nondecreasing")
    low, high = (F.leaky_relu(end, module.negative_slope) for end in (box.lower, box.upper))
    return widened(low, high, 4 * _U)


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
    return widened(low, high, 1024 * _U)


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
    map, reason, derived = None, None, None
    try:
        map = trace(layer.cell, f"{path}[cell]")
        derived = layer.derive(map)
        reason = derived.certificate.refusal
    except Refusal as refusal:
        reason = str(refusal)
    if map is None or derived is None or derived.theory is None:
        raise Refusal(f"the equilibrium layer {path} is not certified: {reason}")
    if map.per_sample:
        raise Refusal(f"dropout in {path}[cell] makes another map of every sample in training mode; call model.eval()")
    if (inner := getattr(layer, "input", None)) is not None:
        box = _propagate(inner, f"{path}[input]", box)
    solver = Auto(tol=min(layer.solver.tol, 1e-4), max_steps=2000, proof_dtype=DTYPE, on_failure="ignore")
    chain = map.to(DTYPE)
    theory, _ = pose(chain, (derived.sign,))
    injections = _within_domain(_injections(layer.injection, box), derived.sign)
    return derived.theory.moved(chain, injections, partial(_solved, solver, chain, theory))


def _solved(solver: Auto, chain: Chain, theory: Theory, b: Tensor) -> Solved:
    found = solver.solve(FixedPointProblem(map=chain, injection=b, theory=theory))
    unknown = torch.full_like(b, torch.nan)
    return Solved(
        lower=unknown if found.lower is None else found.lower,
        upper=unknown if found.upper is None else found.upper,
        proven=found.proven,
        bounded=found.error_bound.isfinite(),
    )


def _injections(injection: Injection, box: Interval) -> Interval:
    """softplus and relu are nondecreasing; relu computes nothing.

    The rounding of softplus is that of 5 v, down to -84 where the floor is, relative to exp(5 v), and of a few more.
    """
    low, high = (positive_injection(end, injection) for end in (box.lower, box.upper))
    return widened(low, high, 128 * _U) if injection == "softplus" else Interval(low, high)


def _within_domain(b: Interval, sign: Sign) -> Interval:
    """NaN for samples with injections that the proof does not cover."""
    if sign is Sign.ANY:
        return b
    least = amin(b.lower)
    covered = least > 0 if sign is Sign.POSITIVE else least >= 0
    return Interval(torch.where(per_sample(covered, b.lower), b.lower, torch.nan), b.upper)


# ----------------------------------------------------------------------------------------------------------- networks


_RULES: dict[type[nn.Module], Callable[[Any, str, Interval], Interval]] = {
    # What else is a step of cells has no meaning outside of one.
    **dict.fromkeys(reading.READERS.keys() - {Inject, Normalize, VariationalDropout}, _step),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
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


@dataclass(frozen=True, kw_only=True)
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
    return ClassCertificate(predicted=predicted, constant=margin > 0, margin=margin)
