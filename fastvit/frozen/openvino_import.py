"""OpenVINO, kept from two things that it does to the process it is in.

Its telemetry would report every import and conversion to Google Analytics, by processes that it forks off this one, and
leave its files in ~/intel. And a Core that has a CPU makes a stack for the signals of its thread; its end puts back the
one that was there before. With two Cores, of which the older ends first, that one is gone by then, and the next Ctrl-C
kills the process. So there is one Core here, to the process's end.
"""

from __future__ import annotations

import functools
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


@functools.cache
def openvino_core():
    """This process's openvino.Core. Raises ImportError."""
    return import_openvino().Core()
