"""The HTML report of a run. Needs perron[train]."""

from perron.report.html import write_report

__all__ = ["write_report"]
