"""Errors of the person at the command line: their message is one line that says what to do instead."""

__all__ = ["UsageError"]


class UsageError(RuntimeError):
    """What was asked for does not exist; the message says what does."""
