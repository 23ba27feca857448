"""Log the L2 norms of the weights, the penalty, lambda, and on request what else tells how weights move."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_l2.arguments import check_types
from lightning_l2.decay.start import WatchedStart, expect_start
from lightning_l2.monitor.alarms import Alarm, NormAlarms
from lightning_l2.monitor.histograms import log_histogram, takes_histograms
from lightning_l2.monitor.layers import Per
from lightning_l2.monitor.options import NormOptions
from lightning_l2.monitor.tracker import NormTracker
from lightning_l2.trainer.clock import ends_step
from lightning_l2.trainer.length import known_steps
from lightning_l2.trainer.logging import log_metrics, log_step, logging_interval
from lightning_l2.trainer.monitored import MonitoredCallback
from lightning_l2.trainer.optimizers import bare_optimizers, optimizers_in_use, splits_early, tell_of_gradients
from lightning_l2.trainer.restoring import before_restoring

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import STEP_OUTPUT
    from torch.optim import Optimizer

_ABOUT_NON_FINITE = NormAlarms()
_SHOWN = ("l2_norm/total", "l2_penalty/total")


class L2NormMonitor(MonitoredCallback):
    r"""Log the L2 norm of every layer, the penalty and lambda of every parameter group.

    | key | quantity | option |
    |---|---|---|
    | `l2_norm/<layer>` | $\lVert w \rVert_2$ | |
    | `l2_rms/<layer>` | $\lVert w \rVert_2 / \sqrt{n}$ with $n$ elements | `rms` |
    | `l2_penalty/<group>` | $\frac{\lambda}{2} \lVert w \rVert_2^2$ | |
    | `weight_decay/<group>` | $\lambda$ in force | |
    | `weight_decay_left/<group>` | $\prod_t (1 - s_t)$, what decay by itself has left so far | |
    | `distance/<layer>` | $\lVert w_t - w_0 \rVert_2$, from where training began | `distance` |
    | `grad_norm/<layer>` | $\lVert g \rVert_2$ | `gradients` |
    | `update_norm/<layer>` | $\lVert w_{t+1} - w_t \rVert_2$, decay included | `updates` |
    | `update_rms/<layer>` | the same over $\sqrt{n}$ | `updates` and `rms` |
    | `update_ratio/<layer>` | the norm over $\lVert w_t \rVert_2$ | `updates` |
    | `angular_update/<layer>` | angle between $w_t$ and $w_{t+1}$, in radians | `rotation` |
    | `angular_equilibrium/<layer>` | what it is expected to be in equilibrium (decoupled Adam, SGD) | `rotation` |
    | `effective_lr/<layer>` | learning rate that a layer before a normalisation feels | `rotation` |
    | `norm_ratio/<layer>` | $\lVert w_t \rVert_2 / \lVert w_0 \rVert_2$ | `initial_ratio` |
    | `spectral_norm/<parameter>` | $\sigma_{\max}$, to about 1e-3 | `spectra` |
    | `stable_rank/<parameter>` | $\lVert w \rVert_2^2 / \sigma_{\max}^2$ | `spectra` |
    | `condition_number/<parameter>` | $\sigma_{\max} / \sigma_{\min}$, at least | `spectra` |
    | `weights/<parameter>` | histogram, for TensorBoard and Weights & Biases | `histograms` |
    | `norm_alarm/<kind>/<layer>` | 1 at the step of an alarm | `alarms` |

    Norms, penalty, updates and angles have a `<key>/total` too, over the parameters that optimizers have (all of the
    module's if there is no optimizer): a moving average of the model or a teacher counts in none. Totals are in
    `trainer.callback_metrics` from the first step of a fit on, so EarlyStopping and ModelCheckpoint can monitor them.

    Quantities of step t are those of the weights that its forward pass used, of the gradients of its last backward pass
    and of the lambda it decayed with. Frozen parameters are left out: training doesn't move them, nothing decays them.
    No weight and no random state is touched.

    A logged step costs one read of the weights, one transfer from the device and, where parameters are sharded, one
    collective; a step that isn't logged costs microseconds, of counting what decay leaves. What options add to a logged
    step: `gradients` a read of the gradients; `updates` and `rotation` a copy of the weights (in fp32 or wider) that
    lives until the step's end, and four reads; `distance` a copy that stays, and a read of it; `spectra` 64 products of
    each matrix with a vector; `histograms` three reads and a few temporaries of 1 MiB; sharded matrices are gathered
    one by one for the last two, except FSDP1's, which are left out.

    Args:
        every_n_steps: Log at every so many optimizer steps; by default at the Trainer's `log_every_n_steps`.
        per: What a layer is: each `"parameter"`, each `"module"` that owns parameters, each parameter `"group"`;
            `"total"` logs no layers.
        depth: With `per="module"`: roll modules up to names of this many components (`encoder.layer.3` has three).
        include: Regular expression: log only layers in whose name it is found. Totals still cover everything.
        rms: Log root mean squares, comparable between layers of different sizes.
        distance: Log how far the weights are from those that training began with, as `towards="start"` knows them.
        prog_bar: Show the total norm and penalty in the progress bar, as of the last logged step.
        gradients: Log gradient norms, unscaled: `"before_clipping"` (the same as true) or `"after_clipping"`, as the
            optimizer leaves them.
        updates: Log how far the weights moved.
        rotation: Log how far the weights turned, and how far they should with the way in which decay acts.
        initial_ratio: Log norms relative to those at the start of training, which are kept in checkpoints.
        spectra: Log singular values at every so many logged steps.
        histograms: Log histograms at every so many logged steps.
        alarms: When to warn, a `lightning_l2.monitor.NormAlarms` or, as in YAML, a mapping of its arguments; by default
            about norms that are not finite. None for never.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before the first step, if gradients are asked for and DeepSpeed has them.

    >>> monitor = L2NormMonitor(every_n_steps=100, per="parameter", updates=True, alarms={"growth": 2.0})
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        per: Per = "module",
        depth: int | None = None,
        include: str | None = None,
        rms: bool = False,
        distance: bool = False,
        prog_bar: bool = False,
        gradients: bool | Literal["before_clipping", "after_clipping"] = False,
        updates: bool = False,
        rotation: bool = False,
        initial_ratio: bool = False,
        spectra: int | None = None,
        histograms: int | None = None,
        alarms: NormAlarms | None = _ABOUT_NON_FINITE,
    ) -> None:
        super().__init__()
        given: Any = alarms
        if isinstance(given, Mapping):
            alarms = NormAlarms.of(given)
        check_types(L2NormMonitor, locals())
        self.options = NormOptions(
            every_n_steps=every_n_steps,
            per=per,
            depth=depth,
            include=include,
            rms=rms,
            distance=distance,
            prog_bar=prog_bar,
            gradients=gradients,
            updates=updates,
            rotation=rotation,
            initial_ratio=initial_ratio,
            spectra=spectra,
            histograms=histograms,
            alarms=alarms,
        )
        # squared norm of each parameter at the start of training, by name
        self._initial: dict[str, float] = {}
        # norms of the weights that training began with, and what decay had left, of a checkpoint
        self._start_norms: dict[str, float] = {}
        self._left: dict[str, float | None] = {}
        self._start: WatchedStart | None = None
        self._fit: NormTracker | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; here, since states are restored after it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.options.gradients and splits_early(trainer):
            raise MisconfigurationException(
                f"L2NormMonitor(gradients={self.options.gradients!r}) can't reach the gradients, which DeepSpeed keeps "
                "to itself. Leave the option out; norms, updates and penalties need no gradients."
            )
        self._release()
        self._initial, self._start_norms, self._left = {}, {}, {}
        if self.options.distance:
            self._start = expect_start(pl_module, partial(before_restoring, trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start afresh, with the optimizers that this fit has."""
        super().on_train_start(trainer, pl_module)
        self._tell_of_unseen(trainer)
        self._fit = NormTracker(self.options, self._initial, self._start)
        self._fit.count(optimizers_in_use(trainer))
        if self._left:
            self._fit.go_on(self._left)
        if self._start is not None:
            self._start.take(pl_module)
            self._start_norms = self._start.norms(pl_module, trainer.model)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure the weights that the step's first forward pass is about to use."""
        self._finish_late(trainer)
        tracker, step = self._fit, log_step(trainer)
        if tracker is None or tracker.seen == step:
            return
        is_first, tracker.seen = tracker.seen is None, step
        interval = logging_interval(trainer, self.options.every_n_steps)
        is_logged = interval > 0 and (step + 1) % interval == 0
        if is_first or is_logged:
            order = step // interval if is_logged else None
            optimizers, holders = optimizers_in_use(trainer), bare_optimizers(trainer)
            tracker.begin(step, pl_module, optimizers, trainer.model, order, holders)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients, which are complete and unscaled now and not clipped yet."""
        # A fused optimizer under a gradient scaler unscales in its own step; its gradients are measured after that.
        if self._fit is not None and self._fit.step is not None:
            tell_of_gradients(trainer, optimizer, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Log once the step is done."""
        if self._fit is None or self._fit.step is None or not ends_step(trainer):
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._fit.take_loss(loss, trainer.accumulate_grad_batches)
        if pl_module.automatic_optimization or self._fit.has_updated:
            self._finish(trainer, self._fit)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a step that a module made in its own hook at the last batch's end."""
        self._finish_late(trainer)

    # Not `state_dict`, of which Lightning wants one a Trainer: what monitors know of the start is the same for all.
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what decay has left, and the norms at the start of training, if anything needs them."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        initial = self._initial if self.options.keeps_initial else {}
        left = self._left if self._fit is None else self._fit.left()
        state: dict[str, Mapping[str, float | None]]
        state = {"initial_squares": initial, "left": left, "start": self._start_norms}
        kept = {key: dict(value) for key, value in state.items() if value}
        if kept:
            checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, {}).update(kept)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what was kept."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._initial, self._left, self._start_norms = (
            dict(state.get(key, {})) for key in ("initial_squares", "left", "start")
        )
        if self._start is not None:
            self._start.resume(self._start_norms)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have totals ready for callbacks that monitor them, also within the first accumulation window."""
        if self._fit is not None and self._fit.step is not None and "l2_norm/total" not in trainer.callback_metrics:
            self._send(trainer, {}, self._offer(self._fit.peek(), is_logged=False))

    def _tell_of_unseen(self, trainer: Any) -> None:
        """Tell of what is asked for and reaches nobody; a trial run mutes its loggers."""
        if trainer.fast_dev_run:
            return
        options, loggers = self.options, [type(logger).__name__ for logger in trainer.loggers]
        if options.histograms is not None and not any(map(takes_histograms, trainer.loggers)):
            rank_zero_info(
                f"L2NormMonitor(histograms={options.histograms}) shows none, since no logger takes histograms, of "
                f"{', '.join(loggers) or 'none'}. Give the Trainer a TensorBoardLogger or a WandbLogger."
            )
        if options.spectra is not None and not loggers:
            rank_zero_info(f"L2NormMonitor(spectra={options.spectra}) shows none, since the Trainer has no logger.")
        interval, steps = options.every_n_steps, known_steps(trainer)
        if loggers and interval is not None and steps is not None and interval > steps:
            rank_zero_info(f"L2NormMonitor(every_n_steps={interval}) logs nothing in a training of {steps} steps.")

    def _finish_late(self, trainer: pl.Trainer) -> None:
        # a step is over, and no optimizer had made it at its batch's end
        if self._fit is not None and self._fit.step not in (None, log_step(trainer)):
            self._finish(trainer, self._fit)

    def _finish(self, trainer: pl.Trainer, tracker: NormTracker) -> None:
        """Log what the step has shown, under the label of its batch."""
        step, metrics, histograms, alarms = tracker.observe()
        raised = {f"norm_alarm/{kind}/{layer}": 1.0 for kind, layer, _ in alarms}
        totals = {key: value for key, value in metrics.items() if key.endswith("/total")}
        totals = self._offer(totals, is_logged=tracker.is_logged)
        self._send(trainer, (metrics if tracker.is_logged else {}) | raised, totals, step)
        for logger in filter(takes_histograms, trainer.loggers if histograms else ()):
            for key, histogram in histograms.items():
                log_histogram(logger, key, histogram, step)
        self._heed(trainer, alarms, step)

    def _send(
        self, trainer: pl.Trainer, metrics: dict[str, float], totals: dict[str, float], step: int | None = None
    ) -> None:
        shown = {key: totals[key] for key in _SHOWN if key in totals} if self.options.prog_bar else {}
        log_metrics(trainer, metrics, totals, step, shown)

    def _release(self) -> None:
        if self._fit is not None:
            self._left = self._fit.left()
        super()._release()

    def _heed(self, trainer: pl.Trainer, alarms: list[Alarm], step: int) -> None:
        for alarm in alarms:
            rank_zero_warn(f"At step {step} {alarm.message}.")
        # The loss differs from process to process, the decision must not.
        if (
            self.options.alarms is not None
            and self.options.alarms.stop
            and trainer.strategy.reduce_boolean_decision(bool(alarms), all=False)
        ):
            trainer.should_stop = True
            reason = f"at step {step} {alarms[0].message}" if alarms else f"another process saw an alarm at step {step}"
            rank_zero_info(f"L2NormMonitor signals the Trainer to stop: {reason}.")
