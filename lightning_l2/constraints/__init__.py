"""Norms held within bounds, or on spheres, after each update of any optimizer."""

from lightning_l2.constraints.attach import AttachedConstraint
from lightning_l2.constraints.bounds import Bound, FixedBound, InflectionBound, InitialBound, RmsBound, WarmupBound
from lightning_l2.constraints.methods import AugmentedLagrangian, Method, Projection, Sphere

__all__ = [
    "AttachedConstraint",
    "AugmentedLagrangian",
    "Bound",
    "FixedBound",
    "InflectionBound",
    "InitialBound",
    "Method",
    "Projection",
    "RmsBound",
    "Sphere",
    "WarmupBound",
]


def __dir__() -> list[str]:
    return __all__
