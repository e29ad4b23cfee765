"""Reading modules: of what class a module is, told only where its forward pass runs that class's own forward and nothing else.

A proof looks at classes and tensors and runs no module, so it must know that nothing else takes part in a forward pass: no
hook, no replaced method, no code of a subclass. Tensors are then read as a forward would read them, through their
parametrisations. Everything that proves reads modules here, and whatever is not known for certain is refused with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from perron._numerics.compilers import constant
from perron.cells.refusal import Refusal
from perron.cells.step import Step, check_arithmetic

__all__ = [
    "CONTAINERS",
    "LAYERS",
    "READERS",
    "children",
    "container",
    "kind",
    "layers",
    "name_of",
    "path_of",
    "read_twice",
    "reads",
    "step",
    "unknown",
    "without_autocast",
]

Class = TypeVar("Class", bound=type[nn.Module])
Reader = TypeVar("Reader", bound=Callable[..., Step])

CONTAINERS: set[type[nn.Module]] = {nn.Sequential}
"""Classes that run their children one after another."""

LAYERS: set[type[nn.Module]] = set()
"""Classes of equilibrium layers: what their certificates say is derived from their cells."""

READERS: dict[type[nn.Module], Callable[[Any, str], Step]] = {}
"""What makes a step of a module of that class, given with its path."""

_GLOBAL_HOOKS = [
    getattr(nn.modules.module, f"_global_{name}")
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
]


def reads(*classes: type[nn.Module]) -> Callable[[Reader], Reader]:
    """Declares the function that makes a step of modules of these classes. A decorator."""

    def declare(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(classes, reader))
        return reader

    return declare


def step(module: nn.Module, path: str) -> Step:
    """The step that a module of a class in `READERS` computes; its tensors stay attached.

    Raises:
        Refusal: what it computes is not known.
    """
    found = READERS[parametrize.type_before_parametrizations(module)](module, path)
    if not torch.compiler.is_compiling():
        check_arithmetic(found.tensors)
    return found


def container(cls: Class) -> Class:
    """Declares a class that inherits all that `nn.Sequential` does in a forward pass. A decorator."""
    CONTAINERS.add(cls)
    return cls


def layers(*classes: type[nn.Module]) -> None:
    """Declares classes of equilibrium layers."""
    LAYERS.update(classes)


def kind(module: nn.Module, path: str) -> type[nn.Module]:
    """The class whose own forward is all that a forward pass of `module` runs; beneath parametrisations.

    The class may still be unknown to the caller, and is then to be refused by `unknown`.

    Raises:
        Refusal: hooks, global ones included, a method replaced on the module or on its class, or a compiled module; the
            message begins with `path`.
    """
    cls = parametrize.type_before_parametrizations(module)
    if any(_GLOBAL_HOOKS):
        raise Refusal(f"{path} runs under global module hooks, whose effect cannot be verified")
    if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
        raise Refusal(f"{path} is compiled, and what it computes cannot be verified; read it before compile()")
    if _has_hooks(module):
        raise Refusal(
            f"{path} carries hooks, whose effect cannot be verified (pruning and the old weight_norm and spectral_norm "
            "are hooks, too: use prune.remove, or torch.nn.utils.parametrizations)"
        )
    if replaced := sorted(_methods(cls) & vars(module).keys()):
        raise Refusal(f"{path} carries a replaced {replaced[0]}, whose effect cannot be verified")
    if _is_patched(cls):
        raise Refusal(f"{path} is a {cls.__name__}, whose methods were replaced; what they do cannot be verified")
    if cls is not type(module):
        _check_parametrised(module, path)
    return cls


@contextmanager
def without_autocast() -> Iterator[None]:
    """Reads weights as solves do: autocast would compute parametrised ones in a coarser precision."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def is_layer(module: nn.Module) -> bool:
    """Whether it is an equilibrium layer of this library, and nothing in it was altered."""
    try:
        return kind(module, "") in LAYERS
    except Refusal:
        return False


def children(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """What a container runs, in order, each with its path; a module that stands there twice counts twice.

    Raises:
        Refusal: a place is empty.
    """
    # Not named_children, which passes over repetitions.
    found = [(f"{path}[{name}]", child) for name, child in module._modules.items() if child is not None]
    if len(found) < len(module._modules):
        raise Refusal(f"{path} has an empty place, which cannot run")
    return found


def name_of(module: nn.Module) -> str:
    """What a path begins with."""
    return parametrize.type_before_parametrizations(module).__name__


def path_of(module: nn.Module, name: str) -> str:
    """The path of what `named_modules` calls by that name."""
    return name_of(module) + "".join(f"[{part}]" for part in name.split(".") if part)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@cache
def _own(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """The names of a class's methods; and it and its bases, each as the file where it is defined and its name there."""
    methods = frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))
    return methods, frozenset((c.__module__, c.__qualname__) for c in cls.__mro__)


# Compilers need not look into these.
@constant
def _methods(cls: Any) -> frozenset[str]:
    return _own(cls)[0]


@constant
def _is_patched(cls: Any) -> bool:
    """Whether a method was defined elsewhere than in the class and its bases.

    By the file, which functools.wraps does not hide, and by its name there: torch has many classes in one file.
    """
    bases = _own(cls)[1]
    # What a layer makes of its input goes through the later ones.
    names = ("forward", "__call__", "_call_impl", "positive", "injected", "_pre_injection", "_read")
    methods = [getattr(cls, name) for name in names if hasattr(cls, name)]
    return not all(
        (getattr(f, "__globals__", {}).get("__name__"), getattr(f, "__qualname__", "").rpartition(".")[0]) in bases
        for f in methods
    )


def _check_parametrised(module: nn.Module, path: str) -> None:
    """Refuse a class beneath which torch's own parametrisation is not all there is, and hooks on parametrisations."""
    # Copying leaves __slotnames__ on a class.
    known = ("__module__", "__doc__", "__slotnames__")
    added = {name: value for name, value in vars(type(module)).items() if name not in known}
    functions = [value.fget if isinstance(value, property) else value for value in added.values()]
    own = type(module).__bases__ == (parametrize.type_before_parametrizations(module),)
    if not own or any(getattr(f, "__globals__", None) is not vars(parametrize) for f in functions):
        raise Refusal(f"{path} is a {type(module).__name__}, which is not torch's own class of a parametrised module")
    for name, child in module.parametrizations.named_modules():  # type: ignore[union-attr, operator]
        if _has_hooks(child):
            raise Refusal(f"{path} carries hooks on its parametrisation of {name}, whose effect cannot be verified")


def unknown(cls: type[nn.Module], path: str, wanted: str) -> Refusal:
    """The refusal of a class: `wanted` says what would have been accepted."""
    known = next((c for c in cls.__mro__[1:] if c.__module__.startswith(("torch.nn.modules", "perron."))), nn.Module)
    family = (
        f", a subclass of {known.__name__}" if known is not nn.Module and cls.__module__ != known.__module__ else ""
    )
    # The path of the root is its class.
    subject = "the module" if path == cls.__name__ else path
    return Refusal(f"{subject} is a {cls.__name__}{family}, which is not known to be {wanted}")


@torch.no_grad()
def read_twice(module: nn.Module) -> None:
    """Refuse parametrisations, anywhere inside, that give another tensor at every read.

    Raises:
        Refusal: two reads of a tensor differ, as under spectral normalisation or dropout of weights in training mode.
    """
    for name, child in module.named_modules():
        if not parametrize.is_parametrized(child):
            continue
        for tensor in child.parametrizations:  # type: ignore[union-attr]
            first, second = getattr(child, tensor), getattr(child, tensor)
            if not torch.allclose(first, second, rtol=0, atol=0, equal_nan=True):
                raise Refusal(
                    f"the {tensor} of {path_of(module, name)} is another one at every read; call model.eval() first"
                )
