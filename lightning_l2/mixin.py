"""A module that brings its own weight decay rules."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.callbacks.weight_decay import WeightDecay
from lightning_l2.norms.squared import squared_norms
from lightning_l2.rules.assign import decay_param_groups, resolve_rules, rules_by_parameter
from lightning_l2.sharding import flat_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import lightning.pytorch as pl
    from torch import Tensor, nn

    from lightning_l2.convert.conversion import Conversion
    from lightning_l2.rules.assign import Rules

    LightningModule = pl.LightningModule
else:
    # no LightningModule of its own, so that it serves those of both packages
    LightningModule = object


class ModuleWeightDecay(WeightDecay):
    """The callback that a module brings, for that module only; a Trainer's own WeightDecay goes before it.

    Attributes:
        bases: The base weight decay of parameters that `decay_param_groups` has grouped, by their `id`.
    """

    def __init__(self, module: pl.LightningModule, weight_decay: float | Conversion | None, *, rules: Rules) -> None:
        super().__init__(weight_decay, rules=list(resolve_rules(rules)))
        self.serve(module)

    def serve(self, module: pl.LightningModule) -> None:
        """Belong to a module, until another one comes that would bring the same."""
        self._module = weakref.ref(module)
        self.bases: dict[int, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stay out of a fit of another module."""
        if self._serves(pl_module):
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stay out of a fit of another module."""
        if self._serves(pl_module):
            super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stay out of a fit of another module."""
        if self._serves(pl_module):
            super().on_train_start(trainer, pl_module)

    def _serves(self, pl_module: pl.LightningModule) -> bool:
        return self._module is not None and self._module() is pl_module

    def _base(self, trainer: pl.Trainer) -> Any:
        base = super()._base(trainer)

        def of_group(group: Mapping[str, Any]) -> float | None:
            own = next((self.bases[id(p)] for p in group["params"] if id(p) in self.bases), None)
            return own if own is not None else base(group) if callable(base) else base

        return of_group if self.bases else base

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback starts with."""
        return {**super().__getstate__(), "_module": None}

    @property
    def state_key(self) -> str:
        """Share checkpoints with a WeightDecay that is given to the Trainer."""
        return WeightDecay.__qualname__


def _told(configure_callbacks: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let an override that doesn't call `super()` say that the module then decays nothing."""

    @functools.wraps(configure_callbacks)
    def configure_and_tell(module: Any) -> Any:
        module._has_brought_weight_decay = False
        configured = configure_callbacks(module)
        several = configured if isinstance(configured, Sequence) else [configured]
        has_one = any(isinstance(found, WeightDecay) for found in (*several, *module._trainer_callbacks()))
        if not module._has_brought_weight_decay and not has_one and module.decay_rules is not None:
            rank_zero_warn(
                f"{type(module).__name__}.configure_callbacks does not call super().configure_callbacks(), so "
                "WeightDecayMixin attaches no WeightDecay. Return [*super().configure_callbacks(), ...], or set "
                "decay_rules = None."
            )
            module._has_brought_weight_decay = True
        return configured

    return configure_and_tell


class WeightDecayMixin(LightningModule):
    r"""Let a LightningModule say which weight decay its parameters get, with nothing to add to the Trainer.

    It attaches a `WeightDecay(weight_decay, rules=decay_rules)`, unless the Trainer or the module has a `WeightDecay`
    already. Write it before the LightningModule: `class Net(WeightDecayMixin, LightningModule)`.

    Attributes:
        decay_rules: A preset's name, or rules in order. None attaches no callback.
        weight_decay: Base weight decay, as of torch optimizers, or what it follows from. None keeps what the optimizer
            has.

    Raises:
        TypeError: When a class is made that has the mixin after LightningModule, where it would do nothing.

    >>> from lightning.pytorch import LightningModule
    >>> from torch import nn
    >>> class Net(WeightDecayMixin, LightningModule):
    ...     weight_decay = 0.1
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = nn.Linear(2, 1)
    >>> [(group["name"], group["weight_decay"]) for group in Net().decay_param_groups()]
    [('decay', 0.1), ('no_decay', 0.0)]
    """

    decay_rules: Rules | None = "default"
    weight_decay: float | Conversion | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which `configure_callbacks` of the mixin is never reached."""
        super().__init_subclass__(**kwargs)
        names = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in names[: names.index(WeightDecayMixin.__name__)]:
            raise TypeError(
                f"{cls.__name__} has WeightDecayMixin after LightningModule, where it does nothing. "
                f"Write class {cls.__name__}(WeightDecayMixin, LightningModule)."
            )
        own = vars(cls).get("configure_callbacks")
        if own is not None:
            setattr(cls, "configure_callbacks", _told(own))  # noqa: B010

    def configure_callbacks(self) -> Sequence[pl.Callback]:
        """Add a `WeightDecay` to the module's callbacks; here, since Lightning asks for them before each fit."""
        self._has_brought_weight_decay = True
        configured = super().configure_callbacks()
        callbacks = list(configured or ()) if isinstance(configured, Sequence | None) else [configured]
        present = [found for found in (*callbacks, *self._trainer_callbacks()) if isinstance(found, WeightDecay)]
        brought = [found for found in present if isinstance(found, ModuleWeightDecay)]
        if self.decay_rules is None or len(brought) < len(present):
            return callbacks
        rules = resolve_rules(self.decay_rules)
        for found in brought:
            if (found.rules, found.weight_decay) == (rules, self.weight_decay):
                found.serve(self)
                return callbacks
        return [*callbacks, ModuleWeightDecay(self, self.weight_decay, rules=rules)]

    def decay_param_groups(
        self, weight_decay: float | None = None, parameters: Iterable[nn.Parameter] | None = None
    ) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer that `configure_optimizers` makes by hand.

        Args:
            weight_decay: Base weight decay; by default the attribute of that name.
            parameters: Those to group, for one of several optimizers; by default all that are trainable.

        Raises:
            ValueError: If there is no base weight decay.
        """
        base = self._base(weight_decay)
        groups = decay_param_groups(self, base, self._rules(), self._outermost())
        if parameters is not None:
            wanted = {id(parameter) for parameter in parameters}
            chosen = [{**group, "params": [p for p in group["params"] if id(p) in wanted]} for group in groups]
            groups = [group for group in chosen if group["params"]]
        for callback in self._trainer_callbacks():
            if isinstance(callback, ModuleWeightDecay):
                # its rules then give each group the weight decay it has here, not a multiple of that
                callback.bases |= {id(parameter): base for group in groups for parameter in group["params"]}
        return groups

    def l2_norm(self) -> Tensor:
        r"""Return the L2 norm of all trainable parameters, $\|w\|_2$.

        Returns:
            Shape `()`, without a gradient. With sharded parameters call it in all processes.
        """
        return self._squares([parameter for parameter in self.parameters() if parameter.requires_grad]).sum().sqrt()

    def l2_penalty(self, weight_decay: float | None = None) -> Tensor:
        r"""Return the L2 penalty, $\sum_g \frac{\lambda_g}{2} \|w_g\|_2^2$, with the base weight decay of the rules.

        Args:
            weight_decay: Base weight decay; by default the attribute of that name.

        Returns:
            Shape `()`, without a gradient: `L2Penalty` adds it to the loss. With sharded parameters call it in all
            processes.

        Raises:
            ValueError: If there is no base weight decay.
        """
        base = self._base(weight_decay)
        assigned = rules_by_parameter(self, self._rules(), self._outermost())
        trainable = [(parameter, rule) for _, parameter, rule in assigned if parameter.requires_grad]
        squares = self._squares([parameter for parameter, _ in trainable])
        return (squares * squares.new_tensor([rule.resolve(base) / 2 for _, rule in trainable])).sum()

    def _rules(self) -> Rules:
        return "default" if self.decay_rules is None else self.decay_rules

    def _base(self, weight_decay: float | None) -> float:
        base = self.weight_decay if weight_decay is None else weight_decay
        if not isinstance(base, (int, float)):
            raise ValueError(
                f"{type(self).__name__} has no number as its weight decay, but {base!r}. "
                "Give `weight_decay`, or set the attribute of that name."
            )
        return base

    def _squares(self, parameters: list[nn.Parameter]) -> Tensor:
        shards = flat_shards(self._outermost())
        return squared_norms(parameters, [shards.get(id(parameter)) for parameter in parameters])

    def _outermost(self) -> nn.Module:
        """Return what a strategy wrapped the module in, which knows about sharded parameters."""
        trainer = self._attached_trainer()
        return self if trainer is None else trainer.strategy.model or self

    def _trainer_callbacks(self) -> list[Any]:
        trainer = self._attached_trainer()
        return [] if trainer is None else list(trainer.callbacks)

    def _attached_trainer(self) -> Any:
        try:
            return self.trainer
        except RuntimeError:  # how Lightning says that there is none
            return None
