"""The shape of a state on its way through the steps of a cell."""

from __future__ import annotations

from collections.abc import Mapping

from perron.cells.refusal import Refusal

__all__ = ["Sizes"]


class Sizes:
    """What the steps so far say of a state: sizes by name, "features" (the last dimension), "channels" (the second),
    "dimensions" with the batch. What no step names may be anything.

    Attributes:
        state: of the state that the cell is given.
        now: of what the steps so far make of it.
        grown: how much longer they make each side of an image.
    """

    def __init__(self) -> None:
        self.state: dict[str, int] = {}
        self.now: dict[str, int] = {}
        self.grown: tuple[int, ...] = ()

    def change(self, sizes: Mapping[str, tuple[int, int]], growth: tuple[int, ...] = ()) -> None:
        """A step that takes and gives such sizes, and lengthens the sides of an image by so much.

        Raises:
            Refusal: it is given other sizes.
        """
        for name, (before, after) in sizes.items():
            # What no step fixed before is as in the state.
            self.state.setdefault(name, before)
            if self.now.setdefault(name, before) != before:
                raise Refusal(f"a step takes {before} {name}, but is given {self.now[name]}")
            self.now[name] = after
        if growth:
            grown = self.grown or (0,) * len(growth)
            self.grown = tuple(a + b for a, b in zip(grown, growth, strict=True))
        if "features" in self.now and any(self.grown):
            raise Refusal("a linear map acts on the last side of an image whose size is changed by another step")

    def require_state(self, what: str, where: str) -> None:
        """A step that holds something of the shape of the state.

        Raises:
            Refusal: the state has become another one.
        """
        if self._moved:
            raise Refusal(
                f"the {what} has the shape of the state, {_named(self.state)}, but where the cell {where} "
                f"the state has become {self._description}"
            )

    def require_return(self) -> None:
        """The end of the cell.

        Raises:
            Refusal: it is no map of a space into itself.
        """
        if self._moved:
            raise Refusal(
                f"the cell is no map of a space into itself: it makes {self._description} of {_named(self.state)}"
            )

    @property
    def _moved(self) -> bool:
        return self.now != self.state or any(self.grown)

    @property
    def _description(self) -> str:
        longer = f" with the sides of every image {self.grown} longer" if any(self.grown) else ""
        return _named(self.now) + longer


def _named(sizes: dict[str, int]) -> str:
    return " and ".join(f"{size} {name}" for name, size in sizes.items()) or "any size"
