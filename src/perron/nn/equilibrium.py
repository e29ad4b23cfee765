"""The equilibrium layer: input -> injection b -> fixed point z = f(z; b) -> output, with certificate and gradient."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._numerics.compilers import outside_compilers
from perron.cells import reading
from perron.cells.chain import Chain
from perron.cells.dropout import VariationalDropout
from perron.cells.opaque import OneSystem, Opaque, as_cell, check_independent
from perron.cells.trace import as_map
from perron.gradients import Call, Gradient, Implicit
from perron.problem import Cell, FixedPointProblem
from perron.solution import AdjointSolution, Solution
from perron.solvers import Auto, Solver
from perron.theory.base import Sign
from perron.theory.certificate import Certificate, refused
from perron.theory.certify import Derived, derive, pose
from perron.theory.enclose import check_injection

__all__ = ["Equilibrium", "Injection", "Start", "State", "positive_injection"]

Injection = Literal["softplus", "relu", "given", "free"]
Start = Tensor | float | Callable[[Tensor], Tensor]

SOFTPLUS_BETA = 5.0
# Beyond it torch's softplus is the identity. At its default, 20, that is a jump of 4e-10, which no bound of softplus allows
# for; here it is 1e-18, less than the rounding of float64.
SOFTPLUS_THRESHOLD = 40.0
# softplus underflows to 0 for very negative arguments, and with sigma(0) = 0 a zero injection has two fixed points. About
# 1e-37, and the same number in every precision.
SMALLEST_INJECTION = 2.0**-123
# What an injection may be, the sign that is wanted most first.
_SIGNS: dict[Injection, tuple[Sign, ...]] = {
    "softplus": (Sign.POSITIVE,),
    "relu": (Sign.NONNEGATIVE,),
    "given": (Sign.NONNEGATIVE, Sign.POSITIVE),
    "free": (Sign.ANY,),
}


def positive_injection(b: Tensor, injection: Injection) -> Tensor:
    """Softplus or relu of b, nondecreasing in it; "given" and "free" change nothing."""
    if injection == "softplus":
        return F.softplus(b, SOFTPLUS_BETA, SOFTPLUS_THRESHOLD).clamp_min(SMALLEST_INJECTION)
    return F.relu(b) if injection == "relu" else b


@dataclass(frozen=True, kw_only=True)
class State:
    """A fixed point as a layer computed it in a forward pass, with its derivatives: see `perron.nn.penalties`.

    Attributes:
        map: the cell.
        injection: (batch, ...) b.
        value: (batch, ...) z*. Where samples may influence each other the batch is one sample, (1, batch, ...), of both.
    """

    map: Cell
    injection: Tensor
    value: Tensor


class Equilibrium(nn.Module):
    """The fixed point z* = f(z*; b) of a cell, as a layer.

    The cell is either an `nn.Sequential` with one `perron.nn.Inject()` where b is added, whose structure is verified
    (see `perron.certify`), or any module or function called as `cell(z, x)`, about which nothing is certified. Of such a cell
    it is not known either that it treats every sample by itself (batch statistics, attention over the batch, nodes of one
    graph): the batch is one system, whose residual is that of the worst sample of what is returned, and which is solved as
    one. Gradients are those of its parameters, of its buffers, and of tensors that are attributes of its modules.

    Args:
        cell: the map f; input and output have the shape of the injection. Without floating point parameters and buffers it
            works in the precision of the input.
        injection: how the layer's input becomes b: "softplus" (beta = 5, floored at 2^-123, so b > 0), "relu" (b >= 0)
            "given" (the input is b, checked nonnegative, and positive where sigma(0) = 0, if the cell is positive concave)
            or "free" (the input is b, of any sign: only "bounded gain" and "monotone operator" cells are certified for that).
        solver: default `Auto()`.
        warm_start: 0, or how much of the moving average of fixed points is kept in a training step; solves then start
            from that average.
        gradient: of `perron.gradients`; None for `Implicit()`, exact to the solver's tolerance and with a bound.
            `JacobianFree()` and `Phantom(...)` are cheaper, a descent direction at best, without a bound.
        z0: where solves start if `forward` is not told and no average is kept: a number, a tensor that broadcasts to one
            state, or a function of the injection (batch, ...); None for zero. It changes the cost but not what is proven;
            where f has several fixed points, it chooses. A start to which f does not come back from near by (a trivial
            fixed point, as zero is in scaling problems) is not called converged.
        independent: declares that samples do not influence each other in a cell that was not read: they are then solved, and
            reported, each by itself, and may leave the batch. Compared once, on the first batch of two or more.

    Shape:
        input and output (batch, ...), floating point.

    Raises:
        ValueError: an input of fewer than two dimensions, of a wrong shape, or a negative given injection; a Sequential
            without `Inject`; a start that is not finite or does not fit; `independent` declared of a cell that is not, or a
            cell that depends on a tensor whose gradient would be lost.
        TypeError: the input is not one tensor, not floating point, or more precise than the layer; a cell that cannot be
            called as `cell(z, x)`; a solver that is none.

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
        cell: nn.Module | Callable[[Tensor, Tensor], Tensor],
        *,
        injection: Injection = "given",
        solver: Solver | None = None,
        warm_start: float = 0.0,
        gradient: Gradient | None = None,
        z0: Start | None = None,
        independent: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= warm_start < 1:
            raise ValueError(f"warm_start must be in [0, 1), got {warm_start}")
        if isinstance(solver, type) or not (solver is None or callable(getattr(solver, "solve", None))):
            raise TypeError(f"solver must be an object of perron.solvers, such as Auto(tol=1e-6), got {solver!r}")
        self.cell = as_cell(cell)
        self.injection = injection
        self.solver: Solver = Auto() if solver is None else solver
        self.last_solution: Solution | None = None
        self.warm_start = warm_start
        self.gradient = Implicit() if gradient is None else gradient
        self.independent = independent
        self._observers: list[Callable[[State], None]] = []
        # The modes of the cell's modules in which it was seen to treat every sample by itself.
        self._compared: set[tuple[bool, ...]] = set()
        # Guesses, not a part of the model: they are neither saved nor do they change what is proven.
        self.register_buffer("mean", None, persistent=False)
        self.z0: Any
        if isinstance(z0, Tensor):
            self.register_buffer("z0", _checked_start(z0).detach().clone(), persistent=False)
        else:
            self.z0 = None if z0 is None else _checked_start(z0)

    @property
    def injection(self) -> Injection:
        """How the layer's input becomes b; may be assigned."""
        return self._injection

    @injection.setter
    def injection(self, injection: Injection) -> None:
        # What it is made of decides what is proven, and what is checked of the input.
        if injection not in ("softplus", "relu", "given", "free"):
            raise ValueError(f"injection must be 'softplus', 'relu', 'given' or 'free', got {injection!r}")
        self._injection = injection

    @property
    def gradient(self) -> Gradient:
        """How the layer is differentiated; may be assigned."""
        return self._gradient

    @gradient.setter
    def gradient(self, gradient: Gradient) -> None:
        if not isinstance(gradient, Gradient):
            raise TypeError(
                f"gradient must be an object of perron.gradients, Implicit(), JacobianFree() or Phantom(...), got {gradient!r}"
            )
        self._gradient = gradient

    def forward(self, x: Tensor, *, z0: Tensor | None = None) -> Tensor:
        """The fixed point, (batch, ...), with its implicit derivatives.

        Args:
            x: (batch, ...) the input.
            z0: (batch, ...) a first guess, for instance the value for a similar input; it saves steps at best.
        """
        check_tensor(x)
        with torch.autocast(x.device.type, enabled=False):
            b, map, dtype = self._read(x)
            # A solve decides from its data what to do next: compilers leave it as it is, and compile what surrounds it.
            value: Tensor = outside_compilers()(self._equilibrium, map, b, z0)
            return value.to(dtype)

    def _equilibrium(self, map: Chain | Opaque, b: Tensor, z0: Tensor | None) -> Tensor:
        """The fixed point of a map for its injections, with its implicit derivatives; keeps the Solution."""
        posed = _Posed.of(map, b, self._guess(b, z0))
        recorder = _Recorder(self, posed)
        value, solution = self.gradient.solve(
            Call(
                map=posed.map,
                injection=posed.injection,
                solver=self.solver,
                pose=self._pose,
                z0=posed.z0,
                on_adjoint=recorder,
            )
        )
        recorder.expect(self._remember(posed.reported(solution)))
        for observe in self._observers:
            observe(State(map=posed.map, injection=posed.injection, value=value))
        value = posed.returned(value)
        self._count_batch(map, b, value)
        return value

    @torch.no_grad()
    def solve(self, x: Tensor, *, z0: Tensor | None = None) -> Solution:
        """The whole Solution, without gradient."""
        check_tensor(x)
        with torch.autocast(x.device.type, enabled=False):
            b, map, _ = self._read(x)
            return self._solve(map, b, z0)

    def _solve(self, map: Chain | Opaque, b: Tensor, z0: Tensor | None) -> Solution:
        posed = _Posed.of(map, b, self._guess(b, z0))
        problem = self._pose(posed.map, posed.injection)
        solution = self.solver.solve(problem) if posed.z0 is None else self.solver.solve(problem, posed.z0)
        return self._remember(posed.reported(solution))

    def certificate(self) -> Certificate:
        """What is proven for every input the layer accepts; see `perron.certify`."""
        with torch.no_grad(), reading.without_autocast():
            map, reason = as_map(self.cell)
            return self.derive(map).certificate if isinstance(map, Chain) else refused(str(reason))

    def injected(self, x: Tensor) -> Tensor:
        """The injection b of an input, in the precision of the solve."""
        return self.positive(self._pre_injection(x).to(self._working_dtype(x)))

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
            remedy = "use torch.view_as_real(x)" if x.is_complex() else "use x.float()"
            raise TypeError(f"the input must be floating point, got {x.dtype}; {remedy}")
        working = self._working_dtype(x)
        if torch.finfo(x.dtype).eps < torch.finfo(working).eps:
            raise TypeError(f"the input is {x.dtype}, more precise than the layer's {working}; use layer.to({x.dtype})")

    def _parameter_dtype(self) -> torch.dtype | None:
        """The precision of the layer, by its parameters or else its cell's buffers; None where the input's is meant."""
        tensors = itertools.chain(self.parameters(), self.cell.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), None)

    def _working_dtype(self, x: Tensor) -> torch.dtype:
        """float16 and bfloat16 are solved in float32."""
        dtype = self._parameter_dtype() or x.dtype
        return dtype if dtype == torch.float64 else torch.float32

    def derive(self, map: Chain) -> Derived:
        """What is proven of a cell that was read, for every input the layer accepts."""
        return derive(map, _SIGNS[self.injection])

    def _read(self, x: Tensor) -> tuple[Tensor, Chain | Opaque, torch.dtype]:
        """The injection, the map in the precision of the solve, and the layer's precision."""
        b = self.injected(x)
        dropout = [m for m in self.cell.modules() if isinstance(m, VariationalDropout) and m.active]
        for module in dropout:
            module.draw(b)
        map, reason = as_map(self.cell, independent=self.independent)
        if dropout and not isinstance(map, Chain):
            raise ValueError(f"dropout in a cell needs one whose every step is known, and here {reason}")
        dtype = self._parameter_dtype() or x.dtype
        return b, map if dtype == b.dtype else map.to(b.dtype), dtype

    @torch.no_grad()
    def _pose(self, map: Cell, b: Tensor) -> FixedPointProblem:
        """The problem with what is proven of it; raises if a given injection is not in the domain of the certificate."""
        if not isinstance(map, Chain):
            if isinstance(map, Opaque):
                self._compare(map, b)
            return FixedPointProblem(map=map, injection=b)
        theory, sign = pose(map, _SIGNS[self.injection])
        # What a subclass or a hook makes of the input is checked as what is given.
        if self.injection == "given" or not reading.is_layer(self):
            check_injection(b, sign)
        return FixedPointProblem(map=map, injection=b, theory=theory)

    def _compare(self, map: Opaque, b: Tensor) -> None:
        """Whether samples that are declared independent are."""
        modes = tuple(m.training for m in self.cell.modules())
        if len(b) > 1 and b.numel() and modes not in self._compared:
            start = self._guess(b, None)
            check_independent(map, torch.zeros_like(b) if start is None else start, b)
            self._compared.add(modes)

    def _guess(self, b: Tensor, z0: Tensor | None) -> Tensor | None:
        """Where to start: as told, else near earlier fixed points, else where the layer says."""
        if z0 is not None:
            if not isinstance(z0, Tensor) or z0.shape != b.shape:
                got: object = tuple(z0.shape) if isinstance(z0, Tensor) else z0
                raise ValueError(f"z0 must have the shape of the injection, {tuple(b.shape)}, got {got!r}")
            return z0.detach().to(b)
        if self.mean is not None and self.mean.shape == b.shape[1:]:
            return self.mean.to(b).expand_as(b)
        return None if self.z0 is None else _start(self.z0, b)

    def _remember(self, solution: Solution) -> Solution:
        self.last_solution = solution
        if self.training and self.warm_start and len(solution.value):
            self._average(solution)
        return solution

    def _average(self, solution: Solution) -> None:
        value = solution.value.detach()[solution.converged]
        if len(value):
            new = value.mean(0)
            old = self.mean
            same = old is not None and old.shape == new.shape
            self.mean = torch.lerp(new, old.to(new), self.warm_start) if same and old is not None else new

    def _count_batch(self, map: Chain | Opaque, b: Tensor, value: Tensor) -> None:
        """Let running averages inside an unverified cell see this batch once, at the fixed point."""
        if self.training and isinstance(map, Opaque) and map.buffers:
            # In the layer's own precision, which its averages have.
            dtype = self._parameter_dtype() or b.dtype
            with torch.no_grad():
                live = replace(map.to(dtype), buffers={})
                live(value.detach().to(dtype), b.detach().to(dtype))

    def __getstate__(self) -> dict[str, Any]:
        # The last Solution is for inspection only; copies and files do without it, and nobody observes them.
        return {**self.__dict__, "last_solution": None, "_observers": []}

    def extra_repr(self) -> str:
        declared = ", independent=True" if self.independent else ""
        return f"injection={self.injection!r}, solver={self.solver}{declared}"


def _checked_start(z0: Start) -> Any:
    if isinstance(z0, Tensor):
        fits = z0.is_floating_point() and bool(z0.isfinite().all())
    else:
        fits = callable(z0) or (isinstance(z0, int | float) and math.isfinite(z0))
    if not fits:
        raise ValueError(f"z0 must be a finite number, a finite tensor, or a function of the injection, got {z0!r}")
    return z0


@torch.no_grad()
def _start(z0: Start, b: Tensor) -> Tensor:
    """The start that a layer was given, for these injections."""
    if not isinstance(z0, Tensor) and callable(z0):
        start = z0(b.detach())
        if not isinstance(start, Tensor) or start.shape != b.shape:
            got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise ValueError(f"the function z0 must return the shape of the injection, {tuple(b.shape)}, got {got}")
        return start.to(b)
    start = torch.as_tensor(z0, dtype=b.dtype, device=b.device)
    try:
        return start.expand(b.shape[1:]).expand_as(b)
    except RuntimeError:
        raise ValueError(
            f"z0 of shape {tuple(start.shape)} does not broadcast to one state, {tuple(b.shape[1:])}"
        ) from None


def check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        several = isinstance(x, tuple | list)
        remedy = "join them with torch.cat, or keep the others on the cell" if several else "use torch.as_tensor(x)"
        raise TypeError(f"the input must be one tensor (batch, ...), got a {type(x).__name__}; {remedy}")


@dataclass(frozen=True)
class _Posed:
    """A map with its injections and start, the whole batch as one sample where samples may influence each other."""

    map: Cell
    injection: Tensor
    z0: Tensor | None
    batch: int | None

    @classmethod
    def of(cls, map: Chain | Opaque, b: Tensor, z0: Tensor | None) -> _Posed:
        if isinstance(map, Chain) or map.independent:
            return cls(map, b, z0, None)
        return cls(OneSystem(map), b.unsqueeze(0), None if z0 is None else z0.unsqueeze(0), len(b))

    def returned(self, value: Tensor) -> Tensor:
        return value if self.batch is None else value.squeeze(0)

    def reported(self, solution: Solution) -> Solution:
        return solution if self.batch is None else solution.of_samples(self.batch)


class _Recorder:
    """Writes the adjoint's report into the Solution that it belongs to, as long as that is the layer's last one.

    It keeps neither the layer nor the Solution alive.
    """

    def __init__(self, layer: Equilibrium, posed: _Posed) -> None:
        self.layer, self.batch = weakref.ref(layer), posed.batch
        self.own: weakref.ref[Solution] | None = None

    def expect(self, solution: Solution) -> None:
        self.own = weakref.ref(solution)

    def __call__(self, adjoint: AdjointSolution) -> None:
        layer, own = self.layer(), None if self.own is None else self.own()
        adjoint = adjoint if self.batch is None else adjoint.of_samples(self.batch)
        # Under vmap over cotangents, or in parts, an adjoint is not that of the batch.
        if layer is None or own is None or layer.last_solution is not own or len(adjoint.steps) != len(own.steps):
            return
        layer.last_solution = replace(own, adjoint=adjoint)
        self.expect(layer.last_solution)
