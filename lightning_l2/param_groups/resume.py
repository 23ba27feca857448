"""Whose weight decay holds when a training resumes: that of its configuration, or that of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OnResume: TypeAlias = Literal["config", "checkpoint", "error"]


class Resuming:
    """Decide, parameter by parameter, between two base lambdas, and remember where they differ.

    Args:
        on_resume: Whose holds; with `"error"` it is for the caller to raise what `differences` says.

    Attributes:
        has_restored: Whether there is a checkpoint.
        restored: The checkpoint's base lambdas by parameter name; None where it was made without this package.

    Raises:
        ValueError: If `on_resume` is none of the three.

    >>> resuming = Resuming("checkpoint")
    >>> resuming.restored = {"head.weight": 0.1}
    >>> resuming.choose("head.weight", 0.2), resuming.choose("body.weight", 0.2)
    (0.1, 0.2)
    """

    def __init__(self, on_resume: OnResume) -> None:
        if on_resume not in get_args(OnResume):
            raise ValueError(f"Expected `on_resume` to be 'config', 'checkpoint' or 'error', got {on_resume!r}.")
        self.on_resume = on_resume
        self.has_restored = False
        self.restored: dict[str, float] | None = None
        # by the `id` of a parameter, the weight decay of the user's group that has it
        self._built_with: dict[int, Any] = {}
        # by `id`, groups that have what a checkpoint says
        self._restored_groups: set[int] = set()
        self._differing: dict[str, tuple[float, float]] = {}

    def take_down(self, optimizers: Sequence[Any]) -> None:
        """Remember which weight decay the user's optimizers were built with, before their states are restored."""
        self._built_with = _own_values(optimizers)

    def configured(self, optimizer: Any, users: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        """Return for each of an optimizer's groups the weight decay that it has, and the one that it was built with.

        Only where a checkpoint is not to decide: restoring an optimizer's state brings the values of its time along.

        Args:
            optimizer: One that updates.
            users: The user's own, which may hold that one and give it their options in each step.
        """
        if not self.has_restored or self.on_resume == "checkpoint":
            return []
        now = _own_values(users)
        found: list[tuple[tuple[Any, ...], Any]] = []
        for group in optimizer.param_groups:
            own = group.get("weight_decay")
            known = [id(p) for p in group["params"] if id(p) in self._built_with]
            if not known:
                found.append(((own,), own))
            else:
                found.append(((own, now.get(known[0], own)), self._built_with[known[0]]))
        return found

    def take_over(self, optimizers: Sequence[Any]) -> None:
        """Remember the groups that a checkpoint has restored, if it was made without this package."""
        if self.has_restored and self.restored is None:
            self._restored_groups = {id(group) for optimizer in optimizers for group in optimizer.param_groups}

    def choose(self, name: str, configured: float, group: Mapping[str, Any] | None = None) -> float:
        """Return the base lambda of a parameter, given the one that the configuration asks for, and its group."""
        restored = (self.restored or {}).get(name, configured)
        if group is not None and id(group) in self._restored_groups:
            restored = float(group.get("weight_decay", configured))
        if restored != configured:
            self._differing[name] = (configured, restored)
        return restored if self.on_resume == "checkpoint" else configured

    def differences(self) -> str | None:
        """Say how the two differed in what was chosen since the last call, None if they didn't."""
        differing, self._differing = self._differing, {}
        if not differing:
            return None
        name, (configured, restored) = next(iter(differing.items()))
        return (
            f"The weight decay of {len(differing)} parameters differs between configuration and checkpoint, for "
            f"example of {name!r}: {configured:g} is configured, {restored:g} in the checkpoint"
        )


def _own_values(optimizers: Sequence[Any]) -> dict[int, Any]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(parameter): group.get("weight_decay") for group in groups for parameter in group["params"]}
