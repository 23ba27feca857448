"""L2 norms of parameters: accurate in every dtype, at the memory's speed, global for sharded tensors."""

from lightning_l2.norms.squared import l2_norms, squared_norms

__all__ = ["l2_norms", "squared_norms"]


def __dir__() -> list[str]:
    return __all__
