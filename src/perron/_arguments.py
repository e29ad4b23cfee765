"""Typed functions as commands: parameters become options, docstrings become help, words become a call."""

from __future__ import annotations

import inspect
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["call", "first_line"]


def first_line(documented: Callable[..., Any]) -> str:
    """Of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def call(
    command: Callable[..., str],
    words: Sequence[str],
    *,
    prog: str,
    help: dict[str, str],
    epilog: str = "",
    record: type[Any] | None = None,
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Call a function with what the words say.

    Args:
        command: what it takes by position and has no default is an argument, all else an option. If it takes any number of
            words, those it does not know are passed on.
        words: of the command line, behind the name of the command.
        prog: that name.
        help: of parameters that the docstrings leave out.
        epilog: below the help.
        record: a class of options; the first argument of the command is one of its objects.
        fixed: arguments that are no options.

    Raises:
        argparse.ArgumentError: the words do not fit.
    """
    from jsonargparse import ArgumentParser

    about = first_line(record or command)
    parser = ArgumentParser(prog=prog, description=about, epilog=epilog, exit_on_error=False, allow_abbrev=False)
    parameters = list(inspect.signature(command).parameters.values())
    options = inspect.signature(record).parameters if record else {}
    if record is not None:
        _add(parser, record, options.values(), help)
        parameters = parameters[1:]
    _add(parser, command, [p for p in parameters if p.name not in fixed], help)
    known, others = list(words), list[str]()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        known, others = _split(words, parser._option_string_actions)
    given = {**parser.parse_args(known).as_dict(), **fixed}
    first = [record(**{name: given.pop(name) for name in options})] if record else []
    first += [given.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return command(*first, *others, **given)


def _add(
    parser: Any, documented: Callable[..., Any], parameters: Collection[inspect.Parameter], help: dict[str, str]
) -> None:
    from docstring_parser import parse

    described = parse(inspect.getdoc(documented) or "").params
    said = {**help, **{p.arg_name: (p.description or "").rstrip(".") for p in described}}
    # Records are no options, and their types are not imported here.
    hints = typing.get_type_hints(documented, localns={"Study": type})
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            continue
        required = p.default is p.empty
        how: dict[str, Any] = {"help": said[p.name]}
        if hints[p.name] is bool:
            how["action"] = "store_true"
        else:
            how["type"] = _type(hints[p.name])
            how |= {} if required else {"default": p.default}
        parser.add_argument(p.name if required else f"--{p.name.replace('_', '-')}", **how)


def _type(hint: Any) -> Any:
    """Of the words: that of the value, which nothing but a default can leave out."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return _Listed(typing.get_args(hint)[0]) if typing.get_origin(hint) is tuple else hint


@dataclass(frozen=True)
class _Listed:
    """Several values in one word, separated by commas."""

    of: type[Any]

    def __call__(self, text: str | tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(text, str):
            return text
        try:
            return tuple(self.of(part) for part in text.split(","))
        except ValueError as error:
            raise ArgumentTypeError(f"{self} are needed, got {text!r}") from error

    def __repr__(self) -> str:
        return {int: "whole numbers", str: "names"}[self.of] + " separated by commas"


def _split(words: Sequence[str], options: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of these options, and those of others; arguments stand before the others."""
    known: list[str] = []
    others: list[str] = []
    into = known
    for word in words:
        if word.startswith("--") or word in options:
            into = known if word.partition("=")[0] in options else others
        into.append(word)
    return known, others
