"""The command line: one command is chosen and run, and what goes wrong is told in one line.

Results go to stdout, everything about the run to stderr. The exit statuses are in commands/_common.py.
"""

from __future__ import annotations

import argparse
import codecs
import os
import signal
import sys

from . import __version__
from .commands import attention, bench, classify, convert, embed, info, train, tune, validate, verify
from .commands._common import FAILED, INTERRUPTED, WRONG_USAGE, UsageError

COMMANDS = (info, verify, tune, bench, train, validate, embed, classify, attention, convert)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if argv is None:  # run from a shell, not from Python
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed before we came, as some services do: what we say is not asked for
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        codecs.register_error("fastvit", _encode_anyway)
        sys.stdout.reconfigure(errors="fastvit")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends a command as Ctrl-C does
    arguments = _parser().parse_args(argv)
    arguments.typed = sys.argv[1:] if argv is None else argv
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()  # here, where what goes wrong with it is caught
        return status
    except UsageError as error:
        return _complain(arguments, error, WRONG_USAGE)
    except KeyboardInterrupt:
        return _complain(arguments, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        return FAILED
    except ImportError as error:
        missing = "PyTorch is not installed: pip install torch" if error.name == "torch" else error
        return _complain(arguments, missing, WRONG_USAGE)
    except (ValueError, OSError, RuntimeError) as error:
        return _complain(arguments, error, FAILED)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # known by now; Python would try once more as it ends, and complain again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvit", description="Custom Triton kernels for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"fastvit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _complain(arguments: argparse.Namespace, error: object, status: int) -> int:
    print(f"fastvit {arguments.command}: error: {error}", file=sys.stderr)
    return status


def _encode_anyway(error: UnicodeEncodeError) -> tuple[str | bytes, int]:
    """File names that are not UTF-8 come out as they are; what the terminal's encoding lacks, as \\u and its number."""
    error.end = error.start + 1
    surrogate = 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF
    return codecs.lookup_error("surrogateescape" if surrogate else "backslashreplace")(error)
