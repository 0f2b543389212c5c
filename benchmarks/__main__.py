"""`python benchmarks [arguments]` in a checkout, nothing installed: the same as `fastvit bench`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a folder, Python has put this one on the path, where its files would shadow other people's modules.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

    from fastvit.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
