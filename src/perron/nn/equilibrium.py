"""The equilibrium layer: input -> injection b -> fixed point z = f(z; b) -> output, with certificate and gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron import reading
from perron.cells import Chain, Opaque, VariationalDropout, as_map
from perron.certificates import Certificate, contracting, derive, either, refused
from perron.enclosure import check_injection
from perron.implicit import Phantom, fixed_point
from perron.solvers import AdjointSolution, Auto, FixedPointProblem, Solution, Solver

__all__ = ["Equilibrium", "Gradient", "Injection", "State", "positive_injection"]

# A solve decides from its data what to do next: compilers leave it as it is, and compile what surrounds it.
_fixed_point = torch.compiler.disable(fixed_point)

Injection = Literal["softplus", "relu", "given", "free"]
Gradient = Literal["implicit", "jacobian_free"] | Phantom

SOFTPLUS_BETA = 5.0
# Beyond it torch's softplus is the identity. At its default, 20, that is a jump of 4e-10, which no bound of softplus allows
# for; here it is 1e-18, less than the rounding of float64.
SOFTPLUS_THRESHOLD = 40.0
# softplus underflows to 0 for very negative arguments, and with sigma(0) = 0 a zero injection has two fixed points. About
# 1e-37, and the same number in every precision.
SMALLEST_INJECTION = 2.0**-123


def positive_injection(b: Tensor, injection: Injection) -> Tensor:
    """Softplus or relu of b, monotone in it; "given" and "free" change nothing."""
    if injection == "softplus":
        return F.softplus(b, SOFTPLUS_BETA, SOFTPLUS_THRESHOLD).clamp_min(SMALLEST_INJECTION)
    return F.relu(b) if injection == "relu" else b


@dataclass(frozen=True)
class State:
    """A fixed point as a layer computed it in a forward pass, with its derivatives: see `perron.nn.penalties`.

    Attributes:
        map: the cell.
        injection: (batch, ...) b.
        value: (batch, ...) z*.
    """

    map: Chain | Opaque
    injection: Tensor
    value: Tensor


class Equilibrium(nn.Module):
    """The fixed point z* = f(z*; b) of a cell, as a layer.

    The cell is either an `nn.Sequential` with one `perron.nn.Inject()` where b is added, whose structure is verified
    (see `perron.certify`), or any module called as `cell(z, x)`, about which nothing is certified.

    Args:
        cell: the map f; input and output have the shape of the injection.
        injection: how the layer's input becomes b: "softplus" (beta = 5, floored at 1e-37, so b > 0), "relu" (b >= 0)
            "given" (the input is b, checked nonnegative, and positive where sigma(0) = 0, if the cell is positive concave)
            or "free" (the input is b, of any sign: only "bounded gain" and "monotone" cells are certified for that).
        solver: default `Auto()`.
        warm_start: 0, or how much of the moving average of fixed points is kept in a training step; solves then start
            from that average.
        gradient: "implicit" (exact to the solver's tolerance, with a bound), "jacobian_free" or `Phantom(steps, damping)`:
            cheaper, a descent direction at best, without a bound.

    Shape:
        input and output (batch, ...), floating point.

    Raises:
        ValueError: an input of fewer than two dimensions, of a wrong shape, or a negative given injection.
        TypeError: the input is not floating point, or more precise than the layer.

    >>> from perron.nn import Activate, Inject
    >>> from perron.constraints import nonnegative
    >>> cell = nn.Sequential(nonnegative(nn.Linear(3, 3, bias=False)), Inject(), Activate("tanh"))
    >>> layer = Equilibrium(cell, injection="softplus")
    >>> solution = layer.solve(torch.zeros(2, 3))
    >>> solution.certified, bool((solution.error_bound <= 1e-4).all())
    (True, True)
    """

    mean: Tensor | None

    def __init__(
        self,
        cell: nn.Module,
        *,
        injection: Injection = "given",
        solver: Solver | None = None,
        warm_start: float = 0.0,
        gradient: Gradient = "implicit",
    ) -> None:
        super().__init__()
        if not 0 <= warm_start < 1:
            raise ValueError(f"warm_start must be in [0, 1), got {warm_start}")
        if injection not in ("softplus", "relu", "given", "free"):
            raise ValueError(f"injection must be 'softplus', 'relu', 'given' or 'free', got {injection!r}")
        self.cell = cell
        self.injection = injection
        self.solver: Solver = Auto() if solver is None else solver
        self.last_solution: Solution | None = None
        self.warm_start = warm_start
        self.gradient = gradient
        self._observers: list[Callable[[State], None]] = []
        # A guess, not a part of the model: it is neither saved nor does it change what is proven.
        self.register_buffer("mean", None, persistent=False)

    @property
    def gradient(self) -> Gradient:
        """How the layer is differentiated; may be assigned."""
        return self._gradient

    @gradient.setter
    def gradient(self, gradient: Gradient) -> None:
        if gradient not in ("implicit", "jacobian_free") and not isinstance(gradient, Phantom):
            raise ValueError(f"gradient must be 'implicit', 'jacobian_free' or a Phantom, got {gradient!r}")
        self._gradient = gradient

    def forward(self, x: Tensor, *, z0: Tensor | None = None) -> Tensor:
        """The fixed point, (batch, ...), with its implicit derivatives.

        Args:
            x: (batch, ...) the input.
            z0: (batch, ...) a first guess, for instance the value for a similar input; it saves steps at best.
        """
        with torch.autocast(x.device.type, enabled=False):
            b, map, dtype = self._read(x)
            return self._equilibrium(map, b, z0).to(dtype)

    def _equilibrium(self, map: Chain | Opaque, b: Tensor, z0: Tensor | None) -> Tensor:
        """The fixed point of a map for its injections, with its implicit derivatives; keeps the Solution."""
        exact = self.gradient == "implicit"
        value, solution = _fixed_point(
            map if exact else map.rebind([t.detach() for t in map.tensors]),
            b if exact else b.detach(),
            self.solver,
            pose=self._pose,
            z0=self._guess(b, z0),
            on_adjoint=_Recorder(self),
        )
        if not exact:
            phantom = self.gradient if isinstance(self.gradient, Phantom) else Phantom(1, 1.0)
            value = phantom.attach(map, b, value)
        self._count_batch(map, b, value)
        self._remember(solution)
        for observe in self._observers:
            observe(State(map, b, value))
        return value

    @torch.no_grad()
    def solve(self, x: Tensor, *, z0: Tensor | None = None) -> Solution:
        """The whole Solution, without gradient."""
        with torch.autocast(x.device.type, enabled=False):
            b, map, _ = self._read(x)
            return self._solve(map, b, z0)

    def _solve(self, map: Chain | Opaque, b: Tensor, z0: Tensor | None) -> Solution:
        problem, z0 = self._pose(map, b), self._guess(b, z0)
        solution = self.solver.solve(problem) if z0 is None else self.solver.solve(problem, z0)
        self._remember(solution)
        return solution

    def certificate(self) -> Certificate:
        """What is proven for every input the layer accepts; see `perron.certify`."""
        with torch.no_grad():
            return self.derive(*as_map(self.cell))[0]

    def injected(self, x: Tensor) -> Tensor:
        """The injection b of an input, in the precision of the solve."""
        return self.positive(self._pre_injection(x).to(self._working_dtype()))

    def positive(self, b: Tensor) -> Tensor:
        """The injection made of its pre-activation."""
        return positive_injection(b, self.injection)

    def _pre_injection(self, x: Tensor) -> Tensor:
        """What becomes b by softplus or relu; layers with an affine map inside override this."""
        self._check_input(x)
        return x

    def _check_input(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"the input must be (batch, ...), at least two dimensions, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"the input must be floating point, got {x.dtype}")
        working = self._working_dtype()
        if torch.finfo(x.dtype).eps < torch.finfo(working).eps:
            raise TypeError(f"the input is {x.dtype}, more precise than the layer's {working}; use layer.to({x.dtype})")

    def _parameter_dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def _working_dtype(self) -> torch.dtype:
        """float16 and bfloat16 layers solve in float32."""
        dtype = self._parameter_dtype()
        return dtype if dtype == torch.float64 else torch.float32

    def derive(self, map: Chain | Opaque, reason: str | None) -> tuple[Certificate, bool]:
        """The certificate, and whether it needs b > 0 rather than b >= 0."""
        if not isinstance(map, Chain):
            return Certificate(False, False, False, "none", refusal=reason), False
        concave, positive = self._derive_concave(map)
        if concave:
            return concave, positive
        return either(concave, contracting(map, nonnegative_injection=self.injection != "free")), False

    def _derive_concave(self, map: Chain) -> tuple[Certificate, bool]:
        if self.injection == "free":
            return refused("the injection must be nonnegative", kind="positive concave"), False
        if self.injection == "softplus":
            return derive(map, positive_injection=True), True
        certificate = derive(map, positive_injection=False)
        if certificate or self.injection == "relu":
            return certificate, False
        return derive(map, positive_injection=True), True

    def _read(self, x: Tensor) -> tuple[Tensor, Chain | Opaque, torch.dtype]:
        """The injection, the map in the precision of the solve, and the layer's precision."""
        b = self.injected(x)
        dropout = [m for m in self.cell.modules() if isinstance(m, VariationalDropout) and m.active]
        for module in dropout:
            module.draw(b)
        map, reason = as_map(self.cell)
        if dropout and not isinstance(map, Chain):
            raise ValueError(f"dropout in a cell needs one whose every step is known, and here {reason}")
        dtype = self._parameter_dtype() or b.dtype
        if dtype != b.dtype:
            map = map.rebind([t.to(b.dtype) for t in map.tensors])
        return b, map, dtype

    @torch.no_grad()
    def _pose(self, map: Chain | Opaque, b: Tensor) -> FixedPointProblem:
        """The problem with what is proven of it; raises if a given injection is not in the domain of the certificate."""
        if not isinstance(map, Chain):
            return FixedPointProblem(map, b)
        certificate, positive = self._derive_concave(map)
        if not certificate:
            return FixedPointProblem(map, b, contracts=True)
        # What a subclass or a hook makes of the input is checked as what is given.
        if self.injection == "given" or not reading.is_layer(self):
            check_injection(b, positive=positive)
        return FixedPointProblem(map, b, proven=True)

    def _guess(self, b: Tensor, z0: Tensor | None) -> Tensor | None:
        if z0 is not None:
            return z0.detach().to(b)
        if self.mean is None or self.mean.shape != b.shape[1:]:
            return None
        return self.mean.to(b).expand_as(b)

    def _remember(self, solution: Solution) -> None:
        self.last_solution = solution
        if not (self.training and self.warm_start and len(solution.value)):
            return
        value = solution.value.detach()[solution.converged]
        if len(value):
            new = value.mean(0)
            old = self.mean
            same = old is not None and old.shape == new.shape
            self.mean = torch.lerp(new, old.to(new), self.warm_start) if same and old is not None else new

    def _count_batch(self, map: Chain | Opaque, b: Tensor, value: Tensor) -> None:
        """Let running averages inside an unverified cell see this batch once, at the fixed point."""
        if self.training and isinstance(map, Opaque) and map.buffers:
            with torch.no_grad():
                live = replace(map, buffers={})
                live(value.detach(), b.detach())

    def __getstate__(self) -> dict[str, Any]:
        # The last Solution is for inspection only; copies and files do without it, and nobody observes them.
        return {**self.__dict__, "last_solution": None, "_observers": []}

    def extra_repr(self) -> str:
        return f"injection={self.injection!r}, solver={self.solver}"


class _Recorder:
    """Writes the adjoint's report into the layer's last Solution, without keeping the layer alive."""

    def __init__(self, layer: Equilibrium) -> None:
        self.layer = weakref.ref(layer)

    def __call__(self, adjoint: AdjointSolution) -> None:
        layer = self.layer()
        if layer is not None and layer.last_solution is not None:
            layer.last_solution = replace(layer.last_solution, adjoint=adjoint)
