"""`python -m fastvit`: the same as the command `fastvit`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
