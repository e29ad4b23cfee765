"""What is proven about an equilibrium, as a record."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Certificate", "near_one", "refused"]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is proven about an equilibrium, for every input the layer accepts.

    Attributes:
        exists: a fixed point exists.
        unique: it is the only one in the nonnegative orthant, or for kinds "bounded gain" and "monotone operator" at all.
        geometric: the `method` converges to it geometrically.
        kind: "positive concave", "subhomogeneous", "bounded gain", "monotone operator", "network" for a whole module, or "none".
        assumptions: what was checked, in words.
        refusal: None, or the reason why nothing is certified.
        rate: an a-priori contraction factor in `metric`, where the theory gives one below 1.
        metric: "Thompson metric", "sup norm" or "weighted sup norm".
        method: what converges geometrically, "Picard" or "operator splitting".
        parts: for a network, the name and the certificate of every equilibrium layer in it.
    """

    exists: bool
    unique: bool
    geometric: bool
    kind: str
    assumptions: tuple[str, ...] = ()
    refusal: str | None = None
    rate: float | None = None
    parts: tuple[tuple[str, Certificate], ...] = ()
    metric: str = ""
    method: str = "Picard"

    def __bool__(self) -> bool:
        return self.exists and self.unique and self.geometric

    def __str__(self) -> str:
        if not self:
            lines = [f"not certified ({self.kind}): {self.refusal}"]
        else:
            lines = [
                f"certified ({self.kind}): the fixed point exists, is unique, and {self.method} converges geometrically"
            ]
        lines += [f"  checked: {a}" for a in self.assumptions]
        if self.rate is not None:
            lines.append(f"  contraction factor in the {self.metric} at most {self.rate:.4g}")
        for name, part in self.parts:
            lines += [f"{name or 'module'}: " + str(part).replace("\n", "\n  ")]
        return "\n".join(lines)


def refused(reason: str, *, kind: str = "none") -> Certificate:
    """Nothing is certified, for this reason."""
    return Certificate(exists=False, unique=False, geometric=False, kind=kind, refusal=reason)


def near_one(factor: float) -> str:
    """In words that tell 1 from what is next to it."""
    if factor == 1 or not abs(factor - 1) < 1e-5:
        return f"{factor:.6g}"
    return f"1 {'+-'[factor < 1]} {abs(factor - 1):.3g}"
