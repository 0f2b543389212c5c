"""OpenVINO without its telemetry: it would report every import and conversion to Google Analytics, by processes that it
forks off this one, and leave its files in ~/intel."""

from __future__ import annotations

import sys
from types import ModuleType

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> ModuleType:
    """The package. Whoever has imported it before has the telemetry that it comes with. Raises ImportError."""
    if "openvino" not in sys.modules and _TELEMETRY not in sys.modules:
        sys.modules[_TELEMETRY] = None  # as if it were not installed, for which OpenVINO has a stand-in
        try:
            # All of its modules that look for it.
            import openvino.tools.ovc.convert_impl
            import openvino.tools.ovc.main
        finally:
            del sys.modules[_TELEMETRY]
    import openvino as package

    return package
