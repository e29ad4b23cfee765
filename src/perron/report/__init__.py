"""The HTML report of a run. Needs perron[train]."""

from perron.report.figures import svg
from perron.report.html import grid, write_page, write_report

__all__ = ["grid", "svg", "write_page", "write_report"]
