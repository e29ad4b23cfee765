"""Dropout inside a cell: one mask per sample and solve, as a module and as a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import AffineMap, largest
from perron.cells.refusal import Refusal
from perron.cells.sizes import Sizes
from perron.cells.step import known

__all__ = ["MaskStep", "VariationalDropout", "does_nothing"]


@known
@dataclass(frozen=True, kw_only=True)
class MaskStep(AffineStep):
    """A is diagonal; `weights` holds the diagonal of every sample, (batch, ...).

    Attributes:
        scale: what the entries of every mask that may be drawn are at most.
    """

    scale: float

    @property
    def terms(self) -> int:
        return 1

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        (mask,) = self.weights
        if v.shape != mask.shape:
            # Broadcasting would give one sample the mask of another.
            raise ValueError(f"a mask drawn for states of shape {tuple(mask.shape)} met one of {tuple(v.shape)}")
        return v * mask

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return self.apply(g, None)

    def track(self, sizes: Sizes) -> None:
        sizes.require_state("mask", "drops entries")
        super().track(sizes)

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        # A mask is drawn for the state, in its precision.
        return frozenset()

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {}

    def largest_row(self) -> Tensor:
        # Of every mask, not only of the one that was drawn.
        return largest(self.weights[0]).double().clamp_min(self.scale)

    def channels(self) -> tuple[AffineMap, ...]:
        raise Refusal("the spectral radius under dropout is not bounded here")

    @property
    def per_sample(self) -> bool:
        return True

    def select(self, index: Tensor) -> Self:
        return replace(self, weights=(self.weights[0][index],))

    def keeps_positive(self) -> bool:
        return False


class VariationalDropout(nn.Module):
    """Dropout inside a cell: one mask per sample and solve, the same in every evaluation of f.

    In training each entry of the state is zeroed with probability p and scaled by 1/(1 - p) otherwise; in evaluation
    nothing happens. The mask is a nonnegative diagonal matrix, so that a cell keeps its structure, and what is proven of
    it, under every mask. The layer around the cell draws the masks, shaped like its state.

    Source: Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS 2016.

    Args:
        p: probability of a zero, in [0, 1).

    Raises:
        ValueError: p is out of range; or, in training, the state here has another shape than the injection.

    >>> from perron.constraints import nonnegative
    >>> from perron.nn import Activate, Equilibrium, Inject
    >>> linear = nonnegative(nn.Linear(3, 3, bias=False))
    >>> layer = Equilibrium(nn.Sequential(VariationalDropout(0.5), linear, Inject(), Activate("tanh")), injection="softplus")
    >>> layer.solve(torch.randn(4, 3)).certified
    True
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p}")
        self.p = p
        self.mask: Tensor | None = None

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    @torch.no_grad()
    def draw(self, like: Tensor) -> None:
        """New masks, shaped like a batch of states."""
        self.mask = torch.empty_like(like).bernoulli_(1 - self.p).div_(1 - self.p)

    def step(self) -> MaskStep:
        """The last masks; without entries before the first batch.

        Raises:
            Refusal: p was assigned out of range.
        """
        if not 0 <= self.p < 1:
            raise Refusal(f"no mask of a dropout with p = {self.p} is known; p must be in [0, 1)")
        mask = torch.empty(0) if self.mask is None else self.mask
        # A little more than 1/(1 - p), which float32 may have rounded up.
        return MaskStep(weights=(mask,), scale=(1 + 2**-20) / (1 - self.p))

    def forward(self, v: Tensor) -> Tensor:
        return self.step()(v) if self.active else v

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def __getstate__(self) -> dict[str, Any]:
        # A mask belongs to a batch, not to the model.
        return {**self.__dict__, "mask": None}


@reading.reads(VariationalDropout)
def mask_step(module: VariationalDropout, path: str) -> MaskStep:
    return module.step()


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def does_nothing(module: nn.Module, kind: type[nn.Module], path: str) -> bool:
    """Whether a module of that class is a dropout in evaluation mode.

    Raises:
        Refusal: it is a dropout of torch's in training mode.
    """
    if kind is VariationalDropout:
        assert isinstance(module, VariationalDropout)
        return not module.active
    if kind in _DROPOUTS and module.training:
        raise Refusal(f"{path} is a {kind.__name__}, another map at every evaluation; use perron.nn.VariationalDropout")
    return kind in _DROPOUTS
