"""Perron: equilibrium networks whose fixed points come with a proof."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perron import activations, cells, constraints, gradients, infinite_width, models, nn, solvers, theory, verify
    from perron.solution import Solution
    from perron.solvers import Auto, ConvergenceError, ConvergenceWarning, Picard
    from perron.theory import Certificate, certify, enclose

__version__ = "0.2.0"

__all__ = [
    "Auto",
    "Certificate",
    "ConvergenceError",
    "ConvergenceWarning",
    "Picard",
    "Solution",
    "activations",
    "cells",
    "certify",
    "constraints",
    "enclose",
    "gradients",
    "infinite_width",
    "models",
    "nn",
    "solvers",
    "theory",
    "verify",
]

# Where a name is that is no module of its own. All are imported when first asked for: the command line answers for its
# help before torch is loaded.
_PLACES = {
    "Auto": "perron.solvers",
    "Certificate": "perron.theory",
    "ConvergenceError": "perron.solvers",
    "ConvergenceWarning": "perron.solvers",
    "Picard": "perron.solvers",
    "Solution": "perron.solution",
    "certify": "perron.theory",
    "enclose": "perron.theory",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'perron' has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), name) if name in _PLACES else import_module(f"perron.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
