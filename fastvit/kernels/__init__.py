"""Leads to `kernels/` at the top of a checkout. In a wheel, that folder itself is in this one's place."""

import os

__path__ = [os.path.realpath(os.path.join(__path__[0], "..", "..", "kernels"))]
