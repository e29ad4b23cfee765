"""Limits of every entry, as a module and as a step: the projection onto a box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perron._numerics.rounding import Rounding
from perron.cells import reading
from perron.cells.elementwise import ElementwiseStep
from perron.cells.refusal import Refusal
from perron.cells.sizes import Sizes
from perron.cells.step import Side, check_tensors, known

__all__ = ["Clamp", "ClampStep"]


class Clamp(nn.Module):
    """v -> min(max(v, lower), upper), entry by entry: the projection onto a box.

    At the end of a cell: z = clamp(z - a (Q z - c), lower, upper) solves a quadratic program in a box, and
    z = min(G z + b, upper) is power control with caps.

    Args:
        lower, upper: the limits, numbers or tensors shaped like one sample of what they limit, (...) without the batch;
            -inf and inf for none. Parameters stay parameters, and get gradients; all else is a buffer.

    Shape:
        input and output (batch, ...).

    Raises:
        ValueError: a limit is NaN, a lower one is inf or an upper one -inf, or a lower one is above an upper one; in a forward
            pass, the input has another shape.

    >>> Clamp(0.0, 1.0)(torch.tensor([[-1.0, 0.5, 2.0]]))
    tensor([[0.0000, 0.5000, 1.0000]])
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, lower: Tensor | float = -math.inf, upper: Tensor | float = math.inf) -> None:
        super().__init__()
        for name, limit in (("lower", lower), ("upper", upper)):
            if isinstance(limit, nn.Parameter):
                self.register_parameter(name, limit)
            else:
                limit = torch.as_tensor(limit)
                exact = limit if limit.is_floating_point() else limit.to(torch.get_default_dtype())
                self.register_buffer(name, exact.detach().clone())
        if (fault := _fault(self.lower, self.upper)) is not None:
            raise ValueError(fault)

    def forward(self, v: Tensor) -> Tensor:
        return ClampStep(lower=self.lower, upper=self.upper)(v)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={float(limit):g}" if limit.dim() == 0 else f"{name}={tuple(limit.shape)}"
            for name, limit in (("lower", self.lower), ("upper", self.upper))
        )


def _fault(lower: Tensor, upper: Tensor) -> str | None:
    """What is wrong with these limits, or None."""
    if lower.dim() and upper.dim() and lower.shape != upper.shape:
        return f"limits of shapes {tuple(lower.shape)} and {tuple(upper.shape)} do not fit each other"
    # NaN compares false.
    if not bool(((lower <= upper) & (lower < math.inf) & (upper > -math.inf)).all()):
        return (
            "every lower limit must be a number up to the upper one; they are -inf and inf at most where there is none"
        )
    return None


@known
@dataclass(frozen=True, kw_only=True)
class ClampStep(ElementwiseStep):
    """v -> min(max(v, l), u), nondecreasing with slopes 0 and 1.

    It is the projection onto [l, u], the proximal operator of what is 0 there and infinite elsewhere: monotone operators allow
    it, and forward-backward steps. It picks one of three numbers, so it has no rounding of its own. On the orthant, with
    l <= 0 <= u, it is min(v, u): nondecreasing and concave, positive where v and u are, with the asymptotic slope 0 for a
    finite u, else 1. With u >= 0 and any l it is subhomogeneous of degree 1: s'(v) v is v = s(v) between the limits, and 0
    elsewhere. No less will do where l < u, so that alone it proves nothing for l > 0.

    Attributes:
        lower, upper: l and u, of every entry of a sample or, without dimensions, of all of them.
    """

    lower: Tensor
    upper: Tensor

    def __call__(self, v: Tensor, injection: Tensor | None = None) -> Tensor:
        for limit in self.tensors:
            if limit.dim() and limit.shape != v.shape[1:]:
                # Broadcasting would take a limit of a channel for one of a column, or mix samples.
                raise ValueError(f"limits of shape {tuple(limit.shape)} met a state of shape {tuple(v.shape)}")
        return torch.clamp(v, self.lower, self.upper)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.lower, self.upper

    def rebind(self, tensors: Sequence[Tensor]) -> ClampStep:
        lower, upper = tensors
        return replace(self, lower=lower, upper=upper)

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        found = (torch.where(v < self.lower, y, 0.0), torch.where(v > self.upper, y, 0.0))
        return tuple(g.sum(0) if t.dim() else g.sum() for g, t in zip(found, self.tensors, strict=True))

    @property
    def per_sample(self) -> bool:
        return False

    def select(self, index: Tensor) -> ClampStep:
        return self

    def check(self) -> None:
        check_tensors(self.tensors)

    def track(self, sizes: Sizes) -> None:
        if (fault := _fault(self.lower, self.upper)) is not None:
            raise Refusal(fault)
        for limit in self.tensors:
            if limit.dim() == 1:
                sizes.change({"features": (len(limit),) * 2})
            elif limit.dim() > 1:
                sizes.change({"channels": (len(limit),) * 2, "dimensions": (limit.dim() + 1,) * 2})

    def rigorous(self) -> ClampStep:
        return self

    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        """With v' <= (1 + r) v + t, min(v', u) <= (1 + r) min(v, u) + t for r, t, u >= 0; and so from below, and for max."""
        return before

    def derivative(self, v: Tensor) -> Tensor:
        return ((v >= self.lower) & (v <= self.upper)).to(v.dtype)

    def bounded_derivative(self, v: Tensor, side: Side, slack: Rounding) -> Tensor:
        """Of min(v, u): 1 up to u, and 0 from there on. Twice the slack, since the rounding of these very lines counts, too."""
        # NaN compares false: then they are 1 and 0.
        if side == "upper":
            return (~(v * (1 - 2 * slack.relative) - 2 * slack.absolute > self.upper)).to(v.dtype)
        return (v * (1 + 2 * slack.relative) + 2 * slack.absolute < self.upper).to(v.dtype)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The largest is 0 only outside of the limits, the smallest 1 only inside of them; next to a kink both slopes count."""
        outside = (upper < self.lower) | (lower > self.upper)
        inside = (lower > self.lower) & (upper < self.upper)
        return (~outside).to(lower.dtype), inside.to(lower.dtype)

    def own_rounding(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.zeros_like(lower)

    def rounding_of_value(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    def range(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        if not all(bool(limit.isfinite().all()) for limit in self.tensors):
            return None
        return self.lower.to(like).expand_as(like), self.upper.to(like).expand_as(like)

    @property
    def largest_slope(self) -> float:
        return 1.0

    @property
    def nonexpansive(self) -> bool:
        return True

    def check_concave(self) -> None:
        if not bool(((self.lower <= 0) & (self.upper >= 0)).all()):
            raise Refusal(
                "a clamp maps the orthant into itself, and is concave there, with lower limits up to 0 and upper ones from 0 on"
            )

    def positive(self, before: bool, injected: bool) -> bool:
        return before and bool((self.upper > 0).all())

    @property
    def least(self) -> float:
        return _smallest(torch.minimum(self.lower.clamp_min(0), self.upper))

    @property
    def supremum(self) -> float:
        return float(self.upper.max()) if self.upper.numel() else math.inf

    @property
    def asymptotic_slope(self) -> float:
        return float((self.upper == math.inf).any())

    def degree(self, least: float) -> tuple[float, float]:
        if not bool((self.upper >= 0).all()):
            raise Refusal("a clamp maps the orthant into itself with upper limits from 0 on")
        return 1.0, _smallest(torch.minimum(self.lower.clamp_min(least), self.upper))

    @property
    def name(self) -> str:
        return "clamp"

    @property
    def is_affine(self) -> bool:
        return False

    @property
    def projects(self) -> bool:
        return True


def _smallest(limits: Tensor) -> float:
    return float(limits.min()) if limits.numel() else 0.0


@reading.reads(Clamp)
def clamp_step(module: Clamp, path: str) -> ClampStep:
    return ClampStep(lower=module.lower, upper=module.upper)
