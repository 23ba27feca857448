"""L2 norms held within bounds, or on spheres, while training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.arguments import check_at_least, check_positive, check_types
from lightning_l2.constraints.attach import AttachedConstraint, AttachedConstraints, check_options
from lightning_l2.constraints.bounds import Bound, FixedBound, InitialBound
from lightning_l2.constraints.held import Memory
from lightning_l2.constraints.methods import method_of
from lightning_l2.constraints.selection import names_of_constrained
from lightning_l2.rules.assign import assign_rules, check_without_optimizers, resolve_rules
from lightning_l2.rules.parameters import is_undecided
from lightning_l2.rules.rule import DecayRule
from lightning_l2.sharding import flat_shards
from lightning_l2.trainer.callback import IdleWatch
from lightning_l2.trainer.clock import ends_step
from lightning_l2.trainer.logging import is_logging_step, log_metrics
from lightning_l2.trainer.monitored import MonitoredCallback
from lightning_l2.trainer.optimizers import bare_optimizers, optimizers_in_use, splits_early

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.optim import Optimizer


class NormConstraint(MonitoredCallback):
    r"""Hold L2 norms of weights below a bound, by projection or by an augmented Lagrangian, or exactly on a sphere.

    It acts right after each step of an optimizer, on the parameters of that optimizer, however the step was made. With
    $w$ a parameter, a row of it or a group of parameters, $b$ its bound, $n$ its number of elements, $u$ the
    optimizer's direction and $N(x) = x / \|x\|$:

    $$w \leftarrow w \min\left(1, \frac{b}{\|w\|}\right) \qquad \text{(projection)}$$

    $$\Lambda \leftarrow \max\left(0, \Lambda + \frac{4 \mu}{n} \cdot \frac{\|w\|^2 - b^2}{2}\right), \quad
    w \leftarrow (1 - \Lambda) w \qquad \text{(lagrangian)}$$

    $$w \leftarrow b N(w - \eta b N(u)) \qquad \text{(sphere)}$$

    A projection holds the bound in every step and never touches what is inside. The Lagrangian (CPR) lets a norm exceed
    its bound for a while and pulls it back by a decay $\Lambda$ that it finds itself. On the sphere (Hyperball) a norm
    stays what it is and each step turns the weights by an angle of about the learning rate $\eta$, so choose that anew.
    All act beside any weight decay of the optimizer, so set that to 0 where the constraint is to replace it.

    The sphere reads $u$ from what the optimizer's step has changed, and holds a copy of the constrained weights while
    it updates, two for a moment after that. What a step leaves alone, such as one that a gradient scaler skips, stays
    as it is. In `bf16-true` steps are rounded before anybody sees them: train with `bf16-mixed`.

    Logged keys, with `norm_constraint` for `name`; norms are those between the optimizer's step and the constraint:

    | key | value |
    |---|---|
    | `norm_constraint/bound` | smallest bound |
    | `norm_constraint/slack` | smallest bound minus norm; negative where the constraint acted |
    | `norm_constraint/multiplier` | largest $\Lambda$; of `lagrangian` only |
    | `norm_constraint/bound/<parameter or group>`, ... | the same of each, with `log_each` |

    The first three are in `trainer.callback_metrics` from the first step of a fit on, so EarlyStopping and
    ModelCheckpoint can monitor them.

    Args:
        bound: Largest L2 norm, in the unit of the weights, or where it comes from: one of `lightning_l2.constraints`.
            None, on the sphere, is each norm before the first step.
        method: `"projection"`, `"lagrangian"` or `"sphere"`.
        per: What has a norm: each `"parameter"`; each output `"row"` of a parameter (an index of its dimension 0), as
            in max-norm regularization; or a parameter `"group"` of the optimizer as one vector.
        rules: Who is constrained: parameters that these rules give a weight decay. Exempt ones are left alone. On the
            sphere presets leave out embeddings and the output layer, the last matrix that the module registers: give
            these a rule of your own, before the preset, where they are to be on it.
        update_rate: $\mu$ of `lagrangian`, dimensionless, by default 1 as in the paper. Take less for parameters whose
            mean square comes near 1, such as an `Embedding` as torch initialises it.
        every_n_steps: Log every so many optimizer steps; None is the Trainer's `log_every_n_steps`, 0 never.
        log_each: Whether to log every parameter or group as well.
        name: Prefix of the logged keys; several constraints in one Trainer need one each.

    Raises:
        MisconfigurationException: Before the first step, if no parameter is constrained, or the strategy keeps the
            weights from the optimizer.
        RuntimeError: Before the first step, if a bound would be 0, the first multiplier would turn weights around,
            weights on a sphere are 0, or FSDP has flattened what is to be constrained.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
    Source: Franke, Hefenbrock, Koehler and Hutter, "Improving Deep Learning Optimization through Constrained Parameter
    Regularization", arXiv 2311.09058, 2024.
    Source: Wen, Dang, Lyu, Ma and Liang, "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
    Optimization", arXiv 2606.16899, 2026.

    >>> max_norm = NormConstraint(3.0, per="row")
    >>> from lightning_l2.constraints import InflectionBound
    >>> cpr = NormConstraint(InflectionBound(), method="lagrangian")
    >>> hyperball = NormConstraint(None, method="sphere")
    """

    def __init__(
        self,
        bound: float | Bound | None = None,
        *,
        method: Literal["projection", "lagrangian", "sphere"] = "projection",
        per: Literal["parameter", "row", "group"] = "parameter",
        rules: str | list[DecayRule | str] = "default",
        update_rate: float | None = None,
        every_n_steps: int | None = None,
        log_each: bool = False,
        name: str = "norm_constraint",
    ) -> None:
        super().__init__()
        self.rules = resolve_rules(rules)
        check_types(NormConstraint, locals() | {"rules": self.rules})
        check_at_least(0, every_n_steps=every_n_steps)
        check_without_optimizers(self.rules, "NormConstraint")
        if not name:
            raise ValueError("Expected `name` to be the prefix of the logged keys, got ''. Leave it out, or give one.")
        self._method = method_of(method, update_rate)
        if bound is None and not self._method.compares:
            raise ValueError("Expected `bound` to be a number or a Bound, got None. Only method='sphere' needs none.")
        if isinstance(bound, float | int):
            check_positive(bound=bound)
            bound = FixedBound(float(bound))
        self.bound = bound or InitialBound()
        check_options(self.bound, self._method, per)
        self.method = method
        self.per = per
        self.update_rate = update_rate
        self.every_n_steps = every_n_steps
        self.log_each = log_each
        self.name = name
        # what bounds and multipliers remember, by parameter name and quantity
        self._memory: Memory = {}
        self._fit: AttachedConstraints | None = None
        self._has_logged = False

    @property
    def state_key(self) -> str:
        """Name the callback's state in checkpoints, apart from that of other constraints."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; here, since states are restored after it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._release()
            self._memory, self._has_logged = {}, False
            if splits_early(trainer):
                raise MisconfigurationException(
                    "DeepSpeed overwrites the parameters with copies that its optimizer keeps to itself, so "
                    "NormConstraint can't act on them. Use DDP, FSDP or ModelParallelStrategy."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain about the optimizers and the rules before the sanity check costs time."""
        if not bare_optimizers(trainer):
            raise MisconfigurationException(
                "NormConstraint acts after the steps of an optimizer, and `configure_optimizers` returned None. "
                "Return one, or remove NormConstraint."
            )
        if not is_undecided(pl_module):
            assign_rules(pl_module, self.rules, trainer.model)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take note of the weights before a step; only now have all callbacks had their say about the groups."""
        if self._fit is None:
            self._idle = IdleWatch(trainer)
            self._fit = AttachedConstraints(partial(self._attach, trainer, pl_module), partial(self._follow, trainer))
        self._follow(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take note of lazy parameters, which have a shape after the first forward pass."""
        if self._fit is not None and self._fit.is_undecided:
            self._follow(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the last batch of a step led to."""
        if self._fit is None:
            return
        self._idle.count(trainer, batch)
        logged = is_logging_step(trainer, self.every_n_steps)
        first = not self._has_logged and self.every_n_steps != 0
        if (logged or first) and ends_step(trainer):
            self._has_logged = True
            extremes, each = self._fit.metrics(self.name)
            shown = {**extremes, **(each if self.log_each else {})}
            log_metrics(trainer, shown if logged else {}, monitor=self._offer(extremes, is_logged=logged))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have values ready for callbacks that monitor them, also within the first accumulation window."""
        if self._fit is not None and not self._has_logged and self.every_n_steps != 0:
            if self._fit.is_undecided:
                self._follow(trainer)
            extremes, _ = self._fit.metrics(self.name, before_step=True)
            log_metrics(trainer, {}, monitor=self._offer(extremes, is_logged=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice that nothing of it acted, or that it came to do harm."""
        if self._fit is not None:
            self._idle.end(trainer)
            self._fit.metrics(self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return what bounds and multipliers remember, by parameter name; the optimizers' states are taken next."""
        if self._fit is not None:
            self._fit.memorise()
        parameters = {name: dict(values) for name, values in self._memory.items()}
        return {"bound": type(self.bound).__name__, "per": self.per, "parameters": parameters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what bounds and multipliers remembered, if they are of the same kind."""
        self._release()
        if (state_dict["bound"], state_dict["per"]) == (type(self.bound).__name__, self.per):
            self._memory = {name: dict(values) for name, values in state_dict["parameters"].items()}
        else:
            rank_zero_warn(
                f"The checkpoint's norm constraint had a {state_dict['bound']} per {state_dict['per']}, this one has a "
                f"{type(self.bound).__name__} per {self.per}: bounds and multipliers start anew."
            )

    def _follow(self, trainer: pl.Trainer) -> None:
        if self._fit is not None:
            self._fit.follow(optimizers_in_use(trainer))

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> AttachedConstraint:
        outermost = trainer.model
        return AttachedConstraint(
            optimizer,
            partial(
                names_of_constrained,
                *(pl_module, self.rules, outermost, optimizers_in_use(trainer)),
                hidden=self._method.compares,
            ),
            self.bound,
            per=self.per,
            method=self._method,
            memory=self._memory,
            shards=flat_shards(pl_module if outermost is None else outermost),
        )

    def _release(self) -> None:
        if self._fit is not None:
            self._fit.memorise()
        super()._release()
