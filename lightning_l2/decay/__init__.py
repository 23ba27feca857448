"""How lambda acts on any torch optimizer: coupled, decoupled, independent of the learning rate, or cautious."""

from lightning_l2.decay.attach import Apply, attach_decay
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.decay.penalty import L2Objective, Penalised
from lightning_l2.decay.scheduled import ScheduledDecay

__all__ = ["Apply", "L2Objective", "Penalised", "RuleDecay", "ScheduledDecay", "attach_decay"]


def __dir__() -> list[str]:
    return __all__
