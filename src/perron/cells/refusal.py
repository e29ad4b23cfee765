"""What is said where nothing can be proven."""

from __future__ import annotations

__all__ = ["Refusal"]


class Refusal(ValueError):
    """Why a cell's structure, or a proof about it, could not be verified."""
