"""The demo's report: one HTML file that needs nothing beside it."""

from openblip2.report.page import write_report

__all__ = ["write_report"]
