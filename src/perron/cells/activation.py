"""Activations with declared facts, as modules and as steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from perron.activations import ACTIVATIONS, Activation, get_activation
from perron.cells.step import Refusal

__all__ = ["ACTIVATION_MODULES", "Activate", "ActivationStep", "activation_of", "is_known"]


class Activate(nn.Module):
    """An activation of `perron.activations` as a module, for use in a cell.

    >>> import torch
    >>> Activate("erf")(torch.zeros(1))
    tensor([0.])
    """

    def __init__(self, activation: str | Activation) -> None:
        super().__init__()
        self.activation = get_activation(activation)

    def forward(self, v: Tensor) -> Tensor:
        return self.activation(v)

    def extra_repr(self) -> str:
        return repr(self.activation.name)

    def __reduce__(self) -> Any:
        # Activations hold functions that cannot be pickled; the name says it all.
        if is_known(self.activation):
            return _rebuild_activate, (self.activation.name, self.training)
        return super().__reduce__()


def is_known(activation: Activation) -> bool:
    """Whether its facts are the tested ones, rather than somebody's word."""
    try:
        # Equal, with the same functions: copies of a layer copy the record.
        return get_activation(activation.name) == activation
    except ValueError:
        return False


def _rebuild_activate(name: str, training: bool) -> Activate:
    return Activate(name).train(training)


@dataclass(frozen=True)
class ActivationStep:
    activation: Activation

    def __call__(self, v: Tensor) -> Tensor:
        return self.activation(v)


ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Softsign: "softsign",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.Identity: "identity",
}


def activation_of(module: nn.Module, kind: type[nn.Module], path: str) -> Activation | None:
    """The activation that a module of that class applies to every entry; None where it is another module.

    Raises:
        Refusal: it is not one of `perron.activations`.
    """
    if kind is Activate:
        assert isinstance(module, Activate)
        if not is_known(module.activation):
            raise Refusal(f"the facts of activation {module.activation.name!r} are not among the tested ones")
        return module.activation
    if kind is nn.ReLU6 and (module.min_val, module.max_val) != (0, 6):
        raise Refusal(f"{path} is a ReLU6 from {module.min_val} to {module.max_val}; use limits of 0 and 6")
    return ACTIVATIONS[ACTIVATION_MODULES[kind]] if kind in ACTIVATION_MODULES else None
