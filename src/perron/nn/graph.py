"""Propagation over graphs to its equilibrium, in the manner of APPNP, with positive concave and subhomogeneous cells.

    z = N(sigma((1 - alpha) A z + alpha b))     or     z = N(sigma((1 - alpha) A z) + alpha b)

A is the adjacency with self-loops, normalised symmetrically, and acts on nodes; b >= 0 comes from the features of the
nodes. A is sparse and nonnegative, so the certificates of the cells hold for every graph.

Sources: Gasteiger, Bojchevski, Günnemann, "Predict then propagate", ICLR 2019 (APPNP); Sittoni, Tudisco, "Subhomogeneous
deep equilibrium models", ICML 2024, section 6; the conventions of edge_index are those of torch_geometric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perron._numerics.compilers import outside_compilers
from perron._numerics.rounding import unit_roundoff
from perron.activations import Activation, get_activation
from perron.cells.activation import ActivationStep
from perron.cells.chain import Chain
from perron.cells.injection import Inject, InjectStep
from perron.cells.normalization import NormalizeStep
from perron.cells.refusal import Refusal
from perron.cells.sparse import SparsePattern, SparseStep
from perron.nn.equilibrium import SMALLEST_INJECTION, Equilibrium, Injection, check_tensor
from perron.solvers import Solution, Solver
from perron.theory.certificate import Certificate

__all__ = ["Adjacency", "GraphEquilibrium", "Place", "normalized_adjacency"]

Place = Literal["inside", "outside"]


def normalized_adjacency(
    edge_index: Tensor, edge_weight: Tensor | None, nodes: int, *, dtype: torch.dtype = torch.float32
) -> tuple[SparsePattern, Tensor]:
    """D^-1/2 (A + I) D^-1/2 of a graph, with A[target, source] the weights; edges named twice are added up.

    Args:
        edge_index: (2, edges) integers: sources and targets.
        edge_weight: (edges,) nonnegative, or None for ones; the values have its gradient.
        nodes: their number.
        dtype: of the values.

    Returns:
        (pattern, values), values (nnz,).

    Raises:
        ValueError: wrong shapes or types, nodes out of range, negative or non-finite weights.
    """
    edges = _Edges.of(edge_index, nodes)
    return edges.pattern, edges.values(edge_weight).to(dtype)


@dataclass(frozen=True)
class _Edges:
    """Where A + I has entries.

    Attributes:
        edge_index, nodes: what it was made of, a copy.
        where: (edges + nodes,) the entry that each edge, and each self-loop, adds to.
        rows, columns: (nnz,) of the entries.
        pattern: the same.
    """

    edge_index: Tensor
    nodes: int
    where: Tensor
    rows: Tensor
    columns: Tensor
    pattern: SparsePattern

    @classmethod
    # Tensors made in inference mode could not serve a gradient later.
    @torch.inference_mode(False)
    def of(cls, edge_index: Tensor, nodes: int) -> _Edges:
        if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
            raise ValueError(
                f"edge_index must be an integer tensor (2, edges), got {edge_index.dtype} {tuple(edge_index.shape)}"
            )
        edge_index = edge_index.detach().long().clone()
        if edge_index.numel() and not (int(edge_index.min()) >= 0 and int(edge_index.max()) < nodes):
            raise ValueError(
                f"edge_index names nodes {int(edge_index.min())} to {int(edge_index.max())}, but there are {nodes}"
            )
        loops = torch.arange(nodes, device=edge_index.device)
        key = torch.cat([edge_index[1] * nodes + edge_index[0], loops * nodes + loops])
        key, where = torch.unique(key, return_inverse=True)
        rows, columns = key // max(nodes, 1), key % max(nodes, 1)
        return cls(edge_index, nodes, where, rows, columns, SparsePattern.of(rows, columns, (nodes, nodes)))

    def are(self, edge_index: Tensor, nodes: int) -> bool:
        known = self.edge_index
        comparable = known.device == edge_index.device and not edge_index.is_floating_point()
        return self.nodes == nodes and comparable and torch.equal(known, edge_index)

    def values(self, edge_weight: Tensor | None) -> Tensor:
        """(nnz,) of D^-1/2 (A + I) D^-1/2, float64."""
        count, ones = self.edge_index.shape[1], torch.ones_like(self.where, dtype=torch.float64)
        if edge_weight is None:
            weight = ones
        else:
            if edge_weight.shape != (count,) or edge_weight.is_complex():
                raise ValueError(
                    f"edge_weight must be ({count},), one number for each edge, got {tuple(edge_weight.shape)} {edge_weight.dtype}"
                )
            if not bool(((edge_weight >= 0) & edge_weight.isfinite()).all()):
                raise ValueError("edge_weight must be finite and nonnegative")
            weight = torch.cat([edge_weight.double(), ones[count:]])
        values = weight.new_zeros(len(self.rows)).index_add(0, self.where, weight)
        # Not below the weight of the self-loop, so never zero.
        degree = values.new_zeros(self.nodes).index_add(0, self.rows, values)
        if not bool(degree.isfinite().all()):
            raise ValueError("the weights of the edges into a node add up to more than float64 holds; scale them down")
        scale = degree.rsqrt()
        return values * scale[self.rows] * scale[self.columns]


class Adjacency:
    """`normalized_adjacency` in float64, which keeps the last one: comparing edges is cheaper than sorting them.

    Edges and weights are known again by their content: a tensor may be written to in ways that leave no trace on it.
    """

    def __init__(self) -> None:
        self._edges: _Edges | None = None
        self._weight: Tensor | None = None
        self.last: tuple[SparsePattern, Tensor] | None = None

    def __call__(self, edge_index: Tensor, edge_weight: Tensor | None, nodes: int) -> tuple[SparsePattern, Tensor]:
        known = self._edges is not None and self._edges.are(edge_index, nodes)
        if not known or self._edges is None:
            self._edges, self.last = _Edges.of(edge_index, nodes), None
        differentiable = edge_weight is not None and edge_weight.requires_grad and torch.is_grad_enabled()
        if self.last is not None and not differentiable and _same(self._weight, edge_weight):
            return self.last
        # Made in inference mode they could not serve a gradient later.
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            values = self._edges.values(edge_weight)
            self._weight = None if edge_weight is None else edge_weight.detach().clone()
        self.last = self._edges.pattern, values.detach()
        return self._edges.pattern, values

    def __reduce__(self) -> Any:
        # The graph is found again from its edges.
        return Adjacency, ()


def _same(known: Tensor | None, weight: Tensor | None) -> bool:
    if known is None or weight is None:
        return known is weight
    return known.device == weight.device and known.dtype == weight.dtype and torch.equal(known, weight)


class GraphEquilibrium(Equilibrium):
    """The equilibrium of a propagation over a graph; no parameters of its own.

    Args:
        activation: a name as in `perron.activations`: "tanh" or "softsign" (positive concave, with b > 0 from a softplus),
            "tanh+1.2" (subhomogeneous, with b = relu), ...
        alpha: share of b, in (0, 1]; the teleport probability of APPNP.
        injection: "inside" or "outside" of the activation.
        normalize: None, or the p of the norm over channels that every node is divided by; needs a shifted activation.
        solver: default `Auto()`.

    Shape:
        x (nodes, channels), edge_index (2, edges), edge_weight (edges,) or None; output (nodes, channels), with the gradients
        of x and edge_weight. Without `normalize` the channels are the samples of the Solution, (channels, nodes); with it
        the graph is one sample, (1, channels, nodes).

    Raises:
        Refusal: the activation is none of `perron.activations`, or alpha was assigned out of range.
        ValueError: shapes, nodes out of range, negative weights, alpha outside of (0, 1].
        TypeError: x is not floating point.

    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> layer = GraphEquilibrium("tanh")
    >>> layer(torch.randn(3, 5), path).shape
    torch.Size([3, 5])
    >>> layer.last_solution.certified
    True
    """

    def __init__(
        self,
        activation: str | Activation = "tanh",
        *,
        alpha: float = 0.1,
        injection: Place = "inside",
        normalize: float | None = None,
        solver: Solver | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha}")
        if injection not in ("inside", "outside"):
            raise ValueError(f"injection must be 'inside' or 'outside', got {injection!r}")
        sigma = get_activation(activation)
        positivity: Injection = "relu" if sigma.at_zero > 0 else "softplus"
        super().__init__(nn.Sequential(Inject()), injection=positivity, solver=solver)
        self.activation, self.alpha, self.place = sigma, alpha, injection
        self.normalize = None if normalize is None else NormalizeStep(p=float(normalize), dim=1)
        self._adjacency = Adjacency()
        # Refuses an activation whose facts are nobody's but the user's.
        self._chain(*normalized_adjacency(torch.zeros(2, 0, dtype=torch.long), None, 1)).sizes()

    def forward(  # type: ignore[override]
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, *, z0: Tensor | None = None
    ) -> Tensor:
        """The equilibrium, (nodes, channels), with its implicit derivatives."""
        check_tensor(x)
        with torch.autocast(x.device.type, enabled=False):
            b, chain = self._problem(x, edge_index, edge_weight)
            value = outside_compilers()(self._equilibrium, chain, b, self._first_guess(z0, x))
            return self._to_nodes(value).to(x.dtype)

    @torch.no_grad()
    def solve(  # type: ignore[override]
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, *, z0: Tensor | None = None
    ) -> Solution:
        """The whole Solution, without gradient, in the layout of the state (see Shape)."""
        check_tensor(x)
        with torch.autocast(x.device.type, enabled=False):
            b, chain = self._problem(x, edge_index, edge_weight)
            return self._solve(chain, b, self._first_guess(z0, x))

    def certificate(self) -> Certificate:
        """What is proven for the last graph, solved in float32 and in float64; before the first one, for every graph.

        The rules look at signs and spectral radii only. Those of all normalised adjacencies are the same but for rounding,
        which a single node of a weight a little above 1 stands for.
        """
        with torch.no_grad():
            last = self._adjacency.last
            if last is None:
                pattern, one = normalized_adjacency(torch.zeros(2, 0, dtype=torch.long), None, 1, dtype=torch.float64)
                # Of the entries, of 1 - alpha and of their product, and in float64 of whole rows.
                matrices = [one * (1 + 4 * unit_roundoff(torch.float32))]
            else:
                pattern, matrices = last[0], [last[1].float(), last[1]]
            found = [self.derive(self._chain(pattern, values)).certificate for values in matrices]
            return next((c for c in found if not c), found[0])

    def _first_guess(self, z0: Tensor | None, x: Tensor) -> Tensor | None:
        if z0 is None:
            return None
        if not isinstance(z0, Tensor) or z0.shape != x.shape:
            got = tuple(z0.shape) if isinstance(z0, Tensor) else z0
            raise ValueError(f"z0 must have the shape of x, {tuple(x.shape)}, got {got!r}")
        return self._to_state(z0)

    def _problem(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> tuple[Tensor, Chain]:
        if x.dim() != 2:
            raise ValueError(f"x must be (nodes, channels), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}")
        x = x if x.dtype == torch.float64 else x.float()
        pattern, values = self._adjacency(edge_index, edge_weight, len(x))
        b = self.alpha * self.positive(x)
        if self.injection == "softplus":
            # A small alpha must not make zeros of it.
            b = b.clamp_min(SMALLEST_INJECTION)
        return self._to_state(b), self._chain(pattern, values.to(x))

    def _chain(self, pattern: SparsePattern, values: Tensor) -> Chain:
        if not 0 < self.alpha <= 1:
            raise Refusal(f"alpha must be in (0, 1], got {self.alpha}")
        step = SparseStep(weights=((1 - self.alpha) * values,), pattern=pattern)
        parts: list[Any] = [step, InjectStep(), ActivationStep(activation=self.activation)]
        if self.place == "outside":
            parts = [step, ActivationStep(activation=self.activation), InjectStep()]
        return Chain((*parts, *([] if self.normalize is None else [self.normalize])))

    def _to_state(self, x: Tensor) -> Tensor:
        state = x.t().contiguous()
        return state if self.normalize is None else state.unsqueeze(0)

    def _to_nodes(self, state: Tensor) -> Tensor:
        return (state if self.normalize is None else state.squeeze(0)).t()

    def extra_repr(self) -> str:
        norm = (
            ""
            if self.normalize is None
            else f", normalize={'inf' if math.isinf(self.normalize.p) else self.normalize.p}"
        )
        return f"{self.activation.name!r}, alpha={self.alpha}, injection={self.place!r}{norm}, solver={self.solver}"
