"""What is known of optimizers: whose step they run, how they decay weights themselves, whether they read the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

Way: TypeAlias = Literal["coupled", "decoupled"]

OWN_WAY: dict[str, Way] = {
    "SGD": "coupled",
    "Adam": "coupled",
    "Adamax": "coupled",
    "NAdam": "coupled",
    "RAdam": "coupled",
    "RMSprop": "coupled",
    "Adagrad": "coupled",
    "Adadelta": "coupled",
    "ASGD": "coupled",
    "AdamW": "decoupled",
    "Adafactor": "decoupled",
    "Muon": "decoupled",
}
# Of torch, in the groups of optimizers that can decay either way
DECOUPLED_FLAG = "decoupled_weight_decay"


def torch_class(optimizer: Optimizer) -> str | None:
    """Return the name of the torch class whose step an optimizer runs, None if it runs another one."""
    if not _is_of_torch(getattr(type(optimizer), "step", None)):
        return None
    return next((cls.__name__ for cls in type(optimizer).__mro__ if _is_of_torch(cls)), None)


def own_way(optimizer: Optimizer) -> Way | None:
    """Return how an optimizer applies `weight_decay` itself, None where it has none or nothing is known.

    Coupled are SGD, Adam, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta and ASGD (whose `lambd` is a decay of its
    own besides); decoupled are AdamW, Adafactor, Muon, and Adam, NAdam and RAdam with `decoupled_weight_decay=True`;
    LBFGS, Rprop and SparseAdam have none. Schedule-free optimizers decay y, the point where they take the gradient.

    Args:
        optimizer: A bare torch optimizer.

    >>> import torch
    >>> own_way(torch.optim.AdamW([torch.zeros(1)]))
    'decoupled'
    """
    if is_schedule_free(optimizer):
        return "decoupled" if "weight_decay" in optimizer.defaults else None
    name = torch_class(optimizer)
    if has_decoupled_flag(optimizer):
        ways: set[Way] = {"decoupled" if group[DECOUPLED_FLAG] else "coupled" for group in optimizer.param_groups}
        return ways.pop() if len(ways) == 1 else None
    return OWN_WAY.get(name or "")


def shrinking_by(optimizer: Optimizer, way: Way | None = None) -> Way | None:
    """Return the way of decay for which the share of a step is known, None if it isn't; to be asked once.

    With coupled decay of adaptive optimizers each weight has a share of its own.

    Args:
        optimizer: A bare torch optimizer.
        way: How it decays, by default `own_way`.
    """
    way = way or own_way(optimizer)
    is_known = way == "decoupled" or torch_class(optimizer) == "SGD"
    return way if is_known and not is_schedule_free(optimizer) else None


def share_by(way: Way | None, group: Mapping[str, Any], weight_decay: Any, lr: float | None = None) -> float | None:
    r"""Return the share of the weights that an optimizer's decay takes in a step; every step asks, so it is cheap.

    Decoupled decay takes $\eta \lambda$, coupled decay of SGD with momentum m and dampening d, in the long run,
    $\eta \lambda (1 - d) / (1 - m)$.

    Args:
        way: What `shrinking_by` returned.
        group: One of the optimizer's groups.
        weight_decay: Lambda in force.
        lr: The learning rate $\eta$, by default the group's.

    Returns:
        The share, dimensionless; None where there is none, or a device alone knows it.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.5)
    >>> share_by(shrinking_by(sgd), sgd.param_groups[0], 0.5)
    0.1
    """
    if way is None:
        return None
    rate = group["lr"] if lr is None else lr
    if type(rate) is not float or type(weight_decay) is not float:
        rate, weight_decay = number(rate), number(weight_decay)
    share = rate * weight_decay
    if way == "coupled" and group["momentum"]:
        share = share * (1 - group["dampening"]) / (1 - group["momentum"])
    return share if type(share) is float else None


def has_decoupled_flag(optimizer: Optimizer) -> bool:
    """Return whether torch's `decoupled_weight_decay` says how an optimizer decays."""
    return torch_class(optimizer) in ("Adam", "AdamW", "NAdam", "RAdam") and all(
        DECOUPLED_FLAG in group for group in optimizer.param_groups
    )


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Return whether an optimizer keeps averaged weights, and goes between both as Defazio et al.'s do."""
    return hasattr(optimizer, "train_mode") or any("train_mode" in group for group in optimizer.param_groups)


def reads_loss(optimizer: Optimizer) -> bool:
    """Return whether an optimizer may look at the closure's loss, as line searches do; of torch's only LBFGS does."""
    return torch_class(optimizer) in (None, "LBFGS")


def ascent_sign(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    """Return the sign with which a penalty joins the objective: -1 where the optimizer maximises it."""
    return -1 if group.get("maximize", getattr(optimizer, "maximize", False)) else 1


def step_size(group: Mapping[str, Any]) -> float | Tensor:
    """Return the factor of a group's update: its learning rate, times the scale that Prodigy and D-Adaptation find.

    >>> step_size({"lr": 1.0, "d": 1e-6})
    1e-06
    """
    lr = number(group["lr"])
    return lr * number(group["d"]) if "d" in group else lr


def number(value: Any) -> float | Tensor:
    """Return a host number, or the tensor itself where reading it would synchronise a device."""
    on_device = isinstance(value, Tensor) and value.device.type != "cpu"
    return value.detach() if on_device else float(value)


def _is_of_torch(thing: Any) -> bool:
    return f"{getattr(thing, '__module__', '')}.".startswith("torch.optim.")
