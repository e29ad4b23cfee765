"""Cells f(z; b) as plain functions of tensors: read once from a module, then evaluated, cast, differentiated.

A cell whose structure is known becomes a `Chain` of steps: nonnegative affine maps, one `Inject` (adds the injection b)
and activations with declared facts. Any other module becomes an `Opaque` cell, which can be evaluated and
differentiated but about which nothing is proven.

Rounding. On nonnegative operands a sum of n products has relative error at most gamma_n = n u/(1 - n u) in whatever
order it is summed, and nonnegative concave activations do not amplify relative errors. So one number per chain,
`Rounding.relative`, bounds the relative error of every entry of f(z); `Rounding.absolute` accounts for underflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perron._numerics.rounding import EXACT, Rounding
from perron.activations import Activation
from perron.cells.affine_map import AffineMap
from perron.cells.jacobian import AutomaticLinearization, Diagonal, Factor, Jacobian, Product
from perron.cells.map import Linearization
from perron.cells.refusal import Refusal
from perron.cells.sizes import Sizes
from perron.cells.step import Side, Step, is_known

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain:
    """A cell of known structure: steps applied from left to right."""

    steps: tuple[Step, ...]

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor:
        for step in self.steps:
            z = step(z, injection)
        return z

    @property
    def affine(self) -> tuple[AffineMap, ...]:
        """All the matrices that it multiplies with, the first one first."""
        return tuple(a for s in self.steps for a in s.affine)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for s in self.steps for t in s.tensors)

    @property
    def known(self) -> tuple[Step, ...]:
        """The steps, for whoever proves or differentiates something.

        Raises:
            Refusal: a step is not of one of the classes of this package, or was read from what is not as proofs take it to be
                (an activation whose facts are somebody's word, a weight that is no tensor of real floating-point numbers).
        """
        if torch.compiler.is_compiling():
            # Asked of the same steps before they were compiled.
            return self.steps
        for step in self.steps:
            if not is_known(step):
                raise Refusal(f"nothing is known of steps of class {type(step).__name__}")
            step.check()
        return self.steps

    def sizes(self) -> dict[str, int]:
        """The sizes of a state that the steps fix: see `perron.cells.sizes`.

        Raises:
            Refusal: see `known`; or this is no map of a space into itself, whatever the size of an image is.
        """
        precisions = {dtype for s in self.known for dtype in s.dtypes}
        if len(precisions) > 1:
            raise Refusal(f"the weights of the cell are of several precisions, {sorted(map(str, precisions))}")
        if sum(s.injects for s in self.steps) != 1:
            raise Refusal("a cell adds its injection exactly once")
        sizes = Sizes()
        for step in self.steps:
            step.track(sizes)
        sizes.require_return()
        return sizes.state

    def rebind(self, tensors: Sequence[Tensor]) -> Chain:
        rest = iter(tensors)
        return Chain(tuple(s.rebind([next(rest) for _ in s.tensors]) for s in self.steps))

    def with_kept(self, z: Tensor, injection: Tensor) -> Chain:
        """Itself: a chain holds all that it was read from."""
        return self

    def to(self, dtype: torch.dtype) -> Chain:
        return self.rebind([t.to(dtype) for t in self.tensors])

    def rigorous(self) -> Chain | None:
        """The same map with rigorous sums, to which `rounding` applies; None if that precision offers none here."""
        steps = [s.rigorous() for s in self.known]
        return None if any(s is None for s in steps) else Chain(tuple(s for s in steps if s is not None))

    def at_zero(self, injection: Tensor) -> Tensor:
        """f(0; b), without the products with zero."""
        z: Tensor | None = None
        for step in self.known:
            if z is not None:
                z = step(z, injection)
            elif step.injects:
                z = injection
            elif not step.keeps_zero:
                # Not a plain zero any more: no shortcut.
                return self(torch.zeros_like(injection), injection)
        assert z is not None
        return z

    def behind_injection(self) -> tuple[int, Chain]:
        """The place of the injection, and what follows it."""
        place = [s.injects for s in self.known].index(True)
        return place, Chain(self.steps[place + 1 :])

    @property
    def zero_costs(self) -> bool:
        """Whether `at_zero` takes products."""
        at = next(k for k, s in enumerate(self.steps) if s.injects)
        return not all(s.keeps_zero for s in self.steps[:at]) or bool(Chain(self.steps[at:]).affine)

    @property
    def is_affine(self) -> bool:
        """Whether f is affine in z."""
        return all(s.is_affine for s in self.steps)

    @property
    def per_sample(self) -> bool:
        """Whether the matrices differ from sample to sample."""
        return any(s.per_sample for s in self.steps)

    def select(self, index: Tensor) -> Chain:
        """The map of these samples."""
        return Chain(tuple(s.select(index) for s in self.steps)) if self.per_sample else self

    @property
    def normalizes(self) -> bool:
        """Whether some step divides by a norm: then J is no product of diagonals and matrices."""
        return any(s.normalizes for s in self.steps)

    @property
    def single(self) -> bool:
        """f = sigma(A z + ...): one elementwise step, at the end, so that J = diag(sigma') A."""
        *before, last = self.known
        return bool(before) and last.elementwise and all(s.affine or s.injects for s in before)

    def linear(self, v: Tensor) -> Tensor:
        """A v, all affine steps without bias, injection and activation."""
        for matrix in Chain(self.known).affine:
            v = matrix.linear(v)
        return v

    def preactivation(self, z: Tensor, injection: Tensor) -> Tensor:
        """What the last activation of a `single` chain is given."""
        return Chain(self.steps[:-1])(z, injection)

    def matrix(self, like: Tensor) -> Tensor:
        """A on states of one sample, flattened, (entries, entries); those of all samples are shaped like `like`."""
        size = like[:1].numel()
        unit = torch.eye(size, dtype=like.dtype, device=like.device)
        return self.linear(unit.view(size, *like.shape[1:])).flatten(1).t()

    @property
    def roundings(self) -> int:
        """In a row, of a product with the Jacobian."""
        return sum(a.terms + 4 for a in self.affine) + 4 * len(self.steps)

    @property
    def last_activation(self) -> Activation | None:
        return self.steps[-1].scalar

    @property
    def supremum(self) -> float:
        """A constant super-solution, f(supremum) <= supremum; inf when the chain gives none."""
        return self.steps[-1].supremum

    def rounding(self, dtype: torch.dtype, entries: int = 2**24) -> Rounding:
        """Rounding error of one evaluation of this chain in `dtype`, with rigorous sums, on at most so many entries."""
        return self._roundings(dtype, entries)[-1]

    def _roundings(self, dtype: torch.dtype, entries: int = 2**24) -> list[Rounding]:
        """Before every step, and after the last one."""
        found = [Rounding(0.0, torch.zeros((), dtype=torch.float64), exact=True)]
        for step in self.known:
            found.append(step.rounded(found[-1], dtype, entries))
        return found

    def linearize_at_fixed_point(self, value: Tensor, side: Side | None = None) -> Jacobian | None:
        """J at a fixed point, from its value without evaluating f: where f = sigma(A z + ...) with one affine step.

        Its entries are accurate in comparison with sigma'(0), not each by itself. With `side` the diagonal is an upper
        or lower bound of the one at every fixed point above or below `value`.
        """
        if not self.single or len(self.affine) != 1:
            return None
        slope = self.steps[-1].slope_of_value(value, side)
        return None if slope is None else Jacobian((Product(self.affine[0], value.shape), Diagonal(slope)))

    def pullback(
        self, z: Tensor, injection: Tensor, g: Tensor, needed: Sequence[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of <g, f(z; b)> for b and `tensors`, where needed; differentiable."""
        steps = self.known
        needed = [True] * (1 + len(self.tensors)) if needed is None else needed
        if self.normalizes:
            found = torch.func.vjp(lambda b, *t: self.rebind(t)(z, b), injection, *self.tensors)[1](g)
            return tuple(t if n else None for t, n in zip(found, needed, strict=True))
        inputs = [z]
        for step in steps[:-1]:
            inputs.append(step(inputs[-1], injection))
        # Before the first of them nothing needs a gradient.
        first = next((k for k, s in enumerate(steps) if s.injects or s.tensors), len(steps))
        of_tensors: list[Tensor | None] = []
        of_injection: Tensor | None = None
        for k in range(len(steps) - 1, first - 1, -1):
            step = steps[k]
            if step.injects:
                of_injection = g if needed[0] else None
            wanted = needed[1 + len(self.tensors) - len(of_tensors) - len(step.tensors) :][: len(step.tensors)]
            found = step.gradients(inputs[k], g) if any(wanted) else [None] * len(wanted)
            of_tensors = [*(t if n else None for t, n in zip(found, wanted, strict=True)), *of_tensors]
            for factor in reversed(step.factors(inputs[k]) if k > first else ()):
                g = factor.rmatvec(g)
        return (of_injection, *of_tensors)

    def linearize(self, z: Tensor, injection: Tensor) -> Linearization:
        """J at z."""
        if Chain(self.known).normalizes:
            return AutomaticLinearization.of(self, z, injection)
        return self.linearize_steps(z, injection)

    def linearize_steps(self, z: Tensor, injection: Tensor, side: Side | None = None) -> Jacobian:
        """J at z. With `side` the diagonal factors are rigorous upper or lower bounds, rounding included.

        For positive concave chains at z >= 0; without `side` for all that do not normalise.

        Raises:
            Refusal: a step is not known, or divides by a norm.
        """
        roundings = [EXACT] * (len(self.steps) + 1) if side is None else self._roundings(z.dtype)
        factors: list[Factor] = []
        v = z
        for step, before in zip(self.known, roundings[:-1], strict=True):
            # Of the argument here and of the one at the point that is compared with.
            slack = Rounding(2 * roundings[-1].relative, 2 * before.absolute)
            factors += step.factors(v, side, slack)
            v = step(v, injection)
        return Jacobian(tuple(factors))
