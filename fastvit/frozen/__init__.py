"""Frozen inference: a trained model simplified exactly, on the fastest runtime that is installed."""

from .freeze import Frozen, freeze, load_frozen
from .plan import Plan, Step
from .rewrites import REWRITES, Rewrite
from .runtimes import RUNTIMES, Runtime
from .simplify import Change

__all__ = ["REWRITES", "RUNTIMES", "Change", "Frozen", "Plan", "Rewrite", "Runtime", "Step", "freeze", "load_frozen"]
