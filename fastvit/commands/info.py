"""`fastvit info`: device, versions, back ends, and the tuning tables in force."""

from __future__ import annotations

import argparse
import importlib.util
import json

from . import _common
from ._common import DONE


def add(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(commands, "info", "what is here: device, versions, back ends", run)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    device = _common.checked_device(arguments.device)
    import torch

    from .. import list_models, tuned
    from ..dispatch import interpreting, requested_backend
    from ..environment import environment

    facts = environment(device)
    backends = {"torch": "PyTorch's own operators, on every device"}
    if importlib.util.find_spec("triton") is None:
        backends["triton"] = "not available: Triton is not installed"
    elif device.startswith("cuda") and not interpreting():
        backends["triton"] = "the Triton kernels, compiled for this GPU"
    else:
        backends["triton"] = "the Triton kernels in Triton's interpreter, on the CPU: for checking, not for speed"
    files = {
        str(file.path): f"{len(file.configs)} configs, {len(file.ops)} ops; {file.versions}"
        for file in tuned.table(torch.device(device)).files
    }
    facts |= {"tuning": tuned.mode(), "tables": files or f"none in force; kept in {tuned.folder()}"}
    facts |= {"backends": backends, "requested_backend": requested_backend(), "models": len(list_models())}
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return DONE
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key:<18} {'not installed' if item is None else item}")
        else:
            print(f"{name:<20} {value}")
    return DONE
