"""Hands out the trials of a search so that each is run once, also by several processes that come and go."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_l2.search.storage import import_optuna
from lightning_l2.search.worker import Heartbeat, Watch, is_known_dead, process_id

if TYPE_CHECKING:
    import optuna


class TrialQueue:
    """The trials of a study as numbered places, each filled by one trial that counts.

    A study holds one waiting trial for each place; whoever turns it to running owns it, which the storage allows
    one process only. A trial whose process died is marked as lost and a new one takes its place with the same
    values and the seeds that are done. A trial counts unless it failed without a result of its own.

    Args:
        study: the Optuna study.
        storage: where it is kept.
        places: for each place the values that are fixed beforehand, by name; those not given are sampled.
        heartbeat: time between two signs of life of a running trial, in seconds; a trial is lost after 8 without.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.BaseStorage,
        places: Sequence[Mapping[str, float]],
        heartbeat: float = 15.0,
    ) -> None:
        self._study = study
        self._storage = storage
        self._places = places
        self._heartbeat = heartbeat
        self._optuna = import_optuna()
        self._shared = not isinstance(storage, self._optuna.storages.InMemoryStorage)
        self._watch = Watch(8 * heartbeat)
        self._gaps = Watch(2.0)

    def trials(self) -> dict[int, optuna.trial.FrozenTrial]:
        """Return the trials that count, by place; should a place have two, the older one."""
        state = self._optuna.trial.TrialState
        counting: dict[int, optuna.trial.FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            place = trial.user_attrs.get("place")
            if place is not None and (trial.state != state.FAIL or "error" in trial.user_attrs):
                counting.setdefault(place, trial)
        return counting

    def is_finished(self) -> bool:
        """Return whether every place has a finished trial."""
        trials = self.trials()
        return all(place in trials and trials[place].state.is_finished() for place in range(len(self._places)))

    def fill(self) -> None:
        """Put a waiting trial into every empty place."""
        for place in sorted(set(range(len(self._places))) - set(self.trials())):
            self._study.enqueue_trial(dict(self._places[place]), user_attrs={"place": place})

    def take(self) -> optuna.Trial | None:
        """Take the next waiting trial, or return None while other processes run the rest."""
        self._replace_lost()
        trials = self.trials()
        waiting = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.WAITING,))
        # By place, because one that was given up waits last but is of the grid that others build on.
        for trial in sorted(waiting, key=lambda trial: trial.user_attrs.get("place", len(self._places))):
            place = trial.user_attrs.get("place", len(self._places))
            if place >= len(self._places):
                break
            if trials[place].number != trial.number:
                self._fail(trial)
            elif self._start(trial):
                # Optuna's own `ask` creates a trial where none waits; this takes one or none.
                taken: optuna.Trial = self._optuna.trial.Trial(self._study, trial._trial_id)
                taken.set_user_attr("worker", process_id())
                return taken
        return None

    def wait(self) -> None:
        """Sleep for a moment, then refill places that stay empty because a process died while filling them."""
        time.sleep(random.uniform(0.5, 1.0) * min(1.0, self._heartbeat))
        empty = set(range(len(self._places))) - set(self.trials())
        if self._gaps.stands_still("empty", frozenset(empty)) and empty:
            self.fill()

    def keep_alive(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the trial shows signs of life to other processes."""
        if not self._shared:
            return contextlib.nullcontext()

        def write(beats: int) -> None:
            # The storage may be out of reach for a moment; the trial is lost only after several missed beats.
            with contextlib.suppress(Exception):
                trial.set_user_attr("heartbeat", beats)

        return Heartbeat(write, self._heartbeat)

    def give_back(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> bool:
        """Give up a running trial, so that its place is filled again with its values and finished seeds.

        Returns:
            Whether it was still running; False if another process gave it up before.
        """
        frozen = next(other for other in self._study.get_trials(deepcopy=False) if other.number == trial.number)
        given = self._fail(frozen)
        if given:
            kept: dict[str, Any] = {
                key: frozen.user_attrs[key] for key in ("place", "runs") if key in frozen.user_attrs
            }
            values = frozen.params or frozen.system_attrs.get("fixed_params", {})
            self._study.enqueue_trial(values, user_attrs=kept)
        return given

    def _replace_lost(self) -> None:
        if not self._shared:
            return
        for trial in self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            beat = (worker, trial.user_attrs.get("heartbeat"))
            if (worker is not None and is_known_dead(worker)) or self._watch.stands_still(trial.number, beat):
                self.give_back(trial)

    def _start(self, trial: optuna.trial.FrozenTrial) -> bool:
        return self._set_state(trial, self._optuna.trial.TrialState.RUNNING)

    def _fail(self, trial: optuna.trial.FrozenTrial) -> bool:
        return self._set_state(trial, self._optuna.trial.TrialState.FAIL)

    def _set_state(self, trial: optuna.trial.FrozenTrial, state: optuna.trial.TrialState) -> bool:
        try:
            return self._storage.set_trial_state_values(trial._trial_id, state=state)
        except RuntimeError:
            # It is finished: another process was faster. Optuna 5 has a subclass of its own for this.
            return False
