"""Parametrisations that keep weights in the set a proof needs, whatever touches the parameters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "BoundedRows",
    "MonotoneOperator",
    "Nonnegative",
    "bounded_rows",
    "monotone_operator",
    "nonnegative",
    "project_",
    "project_after_step",
]

Method = Literal["square", "projection"]


class Nonnegative(nn.Module):
    """W >= 0 entrywise, from an unconstrained tensor of the same shape.

    `square`: `W = raw * raw`, smooth, and weight decay on `raw` shrinks W. `projection`: `W = max(raw, 0)`; together
    with `project_after_step` this is the projected optimiser of Gabor et al. (2024).
    With `normalize=True` every output row or filter is `gain * W / ||W||_2`, gain >= 0 (weight normalisation).

    Args:
        method: "square" (default) or "projection".
        normalize: whether to add weight normalisation.

    Raises:
        ValueError: unknown method; or, when the weight is assigned, negative, NaN or infinite entries.
    """

    def __init__(self, method: Method = "square", *, normalize: bool = False) -> None:
        super().__init__()
        if method not in ("square", "projection"):
            raise ValueError(f"method must be 'square' or 'projection', got {method!r}")
        self.method = method
        self.normalize = normalize

    def _constrain(self, raw: Tensor) -> Tensor:
        return raw * raw if self.method == "square" else raw.clamp_min(0)

    def _release(self, weight: Tensor) -> Tensor:
        return weight.sqrt() if self.method == "square" else weight.clone()

    def forward(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        weight = self._constrain(raw)
        if gain is None:
            return weight
        norm = _row_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
        return self._constrain(gain) * (weight / norm)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.contains(weight):
            raise ValueError(
                f"a nonnegative weight was assigned entries in [{weight.min().item():.3g}, {weight.max().item():.3g}]; "
                "clamp it first, or check it for NaN"
            )
        if not self.normalize:
            return self._release(weight)
        return self._release(weight), self._release(_row_norm(weight))

    @staticmethod
    def contains(weight: Tensor) -> bool:
        """Whether the weight is in the set: finite and nonnegative."""
        return bool(((weight >= 0) & torch.isfinite(weight)).all())

    def extra_repr(self) -> str:
        return f"method={self.method!r}, normalize={self.normalize}"


def _row_norm(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))


def nonnegative(
    module: nn.Module, name: str = "weight", *, method: Method = "square", normalize: bool = False
) -> nn.Module:
    """Constrain the parameter `name` of `module` to be nonnegative, starting at its present absolute value.

    >>> linear = nonnegative(nn.Linear(3, 3, bias=False))
    >>> bool((linear.weight >= 0).all())
    True
    """
    with torch.no_grad():
        # Not clamped: where W is exactly 0, the square has no gradient to leave it.
        getattr(module, name).abs_()
    parametrize.register_parametrization(module, name, Nonnegative(method, normalize=normalize))
    return module


class BoundedRows(nn.Module):
    """Rows, or filters, with `sum |W_ij| <= bound`: W = raw, scaled down where its row is longer.

    With an activation of slope at most 1 and a bound below 1 the map contracts in the sup norm, whatever the signs.

    Args:
        bound: positive and finite.

    Raises:
        ValueError: the bound is not positive and finite; or, when the weight is assigned, longer rows, NaN or infinity.
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        if not 0 < bound < float("inf"):
            raise ValueError(f"bound must be positive and finite, got {bound}")
        self.bound = bound

    def forward(self, raw: Tensor) -> Tensor:
        length = _row_length(raw)
        return raw * (self.bound / length.clamp_min(self.bound))

    def right_inverse(self, weight: Tensor) -> Tensor:
        length = _row_length(weight).max() if weight.numel() else weight.new_zeros(())
        # A little more is rounding.
        if not bool(length <= self.bound * 1.001):
            raise ValueError(
                f"a weight with sum |W_ij| = {float(length):.6g} was assigned; the bound is {self.bound:g}"
            )
        return weight.clone()

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def _row_length(weight: Tensor) -> Tensor:
    return weight.abs().flatten(1).sum(1).reshape(-1, *[1] * (weight.dim() - 1))


def bounded_rows(module: nn.Module, name: str = "weight", *, bound: float) -> nn.Module:
    """Constrain the parameter `name` of `module` to rows with sum |W_ij| <= bound, starting from its present values.

    >>> linear = bounded_rows(nn.Linear(3, 3, bias=False), bound=0.9)
    >>> bool((linear.weight.abs().sum(1) <= 0.9001).all())
    True
    """
    constraint = BoundedRows(bound)
    with torch.no_grad():
        weight = getattr(module, name)
        weight.copy_(constraint(weight))
    parametrize.register_parametrization(module, name, constraint)
    return module


class MonotoneOperator(nn.Module):
    """W = (1 - m) I - A^T A + B - B^T: then I - W is strongly monotone, x^T (I - W) x >= m |x|^2.

    Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), which writes m for
    what is called margin here.

    Args:
        margin: m, positive and finite.

    Raises:
        ValueError: the margin is not positive and finite; or, when the weight is assigned, it is not square or I - W has a
            smaller margin.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin must be positive and finite, got {margin}")
        self.margin = margin

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        return (1 - self.margin) * eye - a.t() @ a + b - b.t()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
            raise ValueError(f"a square matrix is needed, got shape {tuple(weight.shape)}")
        dtype, weight = weight.dtype, weight.double()
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        values, vectors = torch.linalg.eigh((1 - self.margin) * eye - (weight + weight.t()) / 2)
        if len(values) and not float(values[0]) >= -1e-4 * (1 + float(values.abs().max())):
            raise ValueError(f"I - W has the margin {self.margin + float(values[0]):.6g}, less than {self.margin:g}")
        return (vectors * values.clamp_min(0).sqrt()).t().to(dtype), ((weight - weight.t()) / 4).to(dtype)

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


def monotone_operator(module: nn.Module, name: str = "weight", *, margin: float = 0.1) -> nn.Module:
    """Constrain the square parameter `name` of `module` so that I - W is strongly monotone with that margin.

    The present value is scaled down where it has less, or, for a margin of 1 or more, a multiple of I is taken off.

    >>> linear = monotone_operator(nn.Linear(3, 3, bias=False), margin=0.5)
    >>> symmetric = (linear.weight + linear.weight.t()).detach() / 2
    >>> bool((torch.linalg.eigvalsh(torch.eye(3) - symmetric) >= 0.4999).all())
    True
    """
    constraint = MonotoneOperator(margin)
    with torch.no_grad():
        weight = getattr(module, name)
        if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
            raise ValueError(f"a square matrix is needed, got shape {tuple(weight.shape)}")
        top = float(torch.linalg.eigvalsh((weight + weight.t()).double() / 2).amax()) if weight.numel() else 0.0
        if top > 1 - margin and margin < 1:
            weight.mul_((1 - margin) / top)
        elif top > 1 - margin:
            # However small W is, I - W has the margin 1 at most.
            weight.diagonal().sub_(top - (1 - margin))
    parametrize.register_parametrization(module, name, constraint)
    return module


@torch.no_grad()
def project_(module: nn.Module) -> None:
    """Clamp the raw tensors of every `projection` constraint in `module` to >= 0, in place."""
    for child in module.modules():
        if not isinstance(child, parametrize.ParametrizationList):
            continue
        if any(isinstance(p, Nonnegative) and p.method == "projection" for p in child):
            for raw in child.parameters(recurse=False):
                raw.clamp_(min=0)


def project_after_step(optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Call `project_(module)` after every step of `optimizer`, as Gabor et al. do. Returns the hook's handle."""
    return optimizer.register_step_post_hook(lambda *_: project_(module))
