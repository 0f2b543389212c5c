"""Where two models that should be one part ways, and why: `parity_report`."""

from .compare import ParityReport, Row, parity_report

__all__ = ["ParityReport", "Row", "parity_report"]
