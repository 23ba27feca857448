"""What is measured of a training's weights, step by step, and when to warn of it."""

from lightning_l2.monitor.alarms import Alarm, NormAlarms
from lightning_l2.monitor.options import NormOptions
from lightning_l2.monitor.tracker import NormTracker

__all__ = ["Alarm", "NormAlarms", "NormOptions", "NormTracker"]


def __dir__() -> list[str]:
    return __all__
