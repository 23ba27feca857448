r"""Decay towards the weights that training began with, $w_0$, in place of 0: L2-SP, for fine-tuning.

Decoupled decay then is $w \leftarrow w - \eta \lambda (w - w_0) - \eta u$, coupled decay and the penalty minimise
$J(w) + \frac{\lambda}{2} \lVert w - w_0 \rVert_2^2$, and cautious decay acts where $u (w - w_0) \ge 0$.

Source: Li, Grandvalet, Davoine, Explicit Inductive Bias for Transfer Learning, arXiv 1802.01483, 2018.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch.nn.parameter import is_lazy

from lightning_l2.arguments import check_choice
from lightning_l2.norms.squared import squared_norms
from lightning_l2.rules.parameters import clean_name
from lightning_l2.sharding import flat_shards, local_part, sum_over_shards

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from lightning_l2.rules.rule import DecayRule

Towards: TypeAlias = Literal["zero", "start"]
StartDevice: TypeAlias = Literal["same", "cpu"]
Watch: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]

# Norms of the same weights differ by less, on whatever device and over however many processes they are summed.
_TOLERANCE = 1e-5


def check_start(towards: Towards, rules: Iterable[DecayRule], device: StartDevice) -> bool:
    """Return whether anything goes towards the start, and refuse to say where a copy is that nobody needs.

    Args:
        towards: What weights go towards whose rule doesn't say.
        rules: The rules.
        device: Where the copy is to be.

    Raises:
        ValueError: If an argument is unknown; if nothing goes there, and the device isn't the one by default.

    >>> check_start("start", [], "cpu")
    True
    """
    check_choice(get_args(Towards), towards=towards)
    check_choice(get_args(StartDevice), start_device=device)
    is_needed = towards == "start" or any(rule.towards == "start" for rule in rules)
    if device != "same" and not is_needed:
        raise ValueError(
            f"`start_device` goes with towards='start', got start_device={device!r} and towards={towards!r}, also in "
            "every rule. Leave it out."
        )
    return is_needed


class Start:
    """The weights that training of a module began with: one copy of those that somebody asks for, and no more.

    A training that goes on from a checkpoint finds them again in the module as it was made, before the checkpoint is
    loaded into it; the checkpoint has their norms, to tell whether they are the same.

    Args:
        device: Where to keep them: on the `"same"` device as the weights, or on the `"cpu"`, from where each step
            brings them.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> start = Start()
    >>> before = start.of(model.weight).clone()
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> torch.equal(start.of(model.weight), before)
    True
    """

    def __init__(self, device: StartDevice = "same") -> None:
        self.device = device
        self._weights: dict[Tensor, Tensor] = {}
        # as they were before a checkpoint was loaded, until training begins
        self._found: dict[Tensor, Tensor] = {}
        self._is_resumed = False
        self._norms: dict[Tensor, float] = {}
        # of a checkpoint by name, until they are compared
        self._expected: dict[str, float] = {}

    def find(self, model: nn.Module) -> None:
        """Copy all weights of a module that a checkpoint is about to be loaded into, unless one was already."""
        if not self._is_resumed:
            self._found = {param: _copy(param) for param in model.parameters() if not is_lazy(param)}

    def resume(self, norms: Mapping[str, float] | None = None) -> None:
        """Learn that a checkpoint was loaded: from now on only what was found before is a start.

        Args:
            norms: As of `expect`.
        """
        self._is_resumed = True
        self.expect(norms or {})

    def expect(self, norms: Mapping[str, float]) -> None:
        """Learn what `norms` returned when the checkpoint was made, which it compares with from now on."""
        self._expected |= norms

    def begin(self) -> None:
        """Learn that training begins: what nobody has asked for is forgotten, and what comes later starts as it is."""
        self._found, self._is_resumed = {}, False

    def of(self, param: Tensor) -> Tensor:
        """Return what this process holds of the start of a parameter, in its dtype.

        Raises:
            RuntimeError: If a checkpoint was loaded before anybody could see the start.
        """
        start = self._weights.get(param)
        if start is None:
            if not self._is_resumed:
                # a module that loads weights by itself was seen before it did
                self._found = {}
            elif param not in self._found:
                raise RuntimeError(
                    f"Nobody knows the weights that a parameter of shape {tuple(param.shape)} started from, since it "
                    "had none when the checkpoint was loaded. Give lazy layers their shapes before `fit`."
                )
            start = self._found.pop(param) if param in self._found else _copy(param)
            start = self._weights[param] = start.to("cpu" if self.device == "cpu" else param.device, param.dtype)
        return start

    def take(self, model: nn.Module) -> None:
        """Have the starts of all parameters of a module that have a shape."""
        for param in model.parameters():
            if not is_lazy(param):
                self.of(param)

    def norms(self, model: nn.Module, root: nn.Module | None = None) -> dict[str, float]:
        """Return the L2 norms of the starts of a module's parameters that somebody has asked for, by name.

        Args:
            model: The module.
            root: The module that a strategy wrapped it in, for shards under FSDP1.

        Raises:
            RuntimeError: If they aren't those of the checkpoint: decay would pull towards other weights than before.
        """
        known = {clean_name(name): param for name, param in model.named_parameters() if param in self._weights}
        new = [param for param in known.values() if param not in self._norms]
        squares = _squares(new, map(self.of, new), flat_shards(root or model))
        self._norms |= zip(new, squares.sqrt().tolist(), strict=True)
        norms = {name: self._norms[param] for name, param in known.items()}
        self._check(norms)
        return norms

    def _check(self, norms: Mapping[str, float]) -> None:
        """Compare with the norms of the checkpoint, once."""
        compared = {name: (norm, self._expected.pop(name)) for name, norm in norms.items() if name in self._expected}
        differing = {
            name: pair for name, pair in compared.items() if not abs(pair[0] - pair[1]) <= _TOLERANCE * min(pair)
        }
        if differing:
            name, (norm, before) = next(iter(differing.items()))
            raise RuntimeError(
                f"{len(differing)} parameters don't start from the weights that training began with: the norm of "
                f"{name!r} is {norm:g}, and was {before:g}. Make the module as it was before training, with the same "
                "pretrained weights or the same seed, and let `fit(ckpt_path=...)` load the checkpoint."
            )


class WatchedStart(Start):
    """The start of a module's training, one for all that ask in a fit: each calls `expect_start`, and `end` at last."""

    def __init__(self, model: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.holders = 0
        self.device_asked: StartDevice | None = None
        self._module = weakref.ref(model)
        self._stop = watch(partial(self.find, model))

    def begin(self) -> None:
        """Learn that training begins."""
        super().begin()
        self._stop()
        self._stop = lambda: None

    def end(self) -> None:
        """Let go, once nobody holds it."""
        self.holders -= 1
        if self.holders == 0:
            self.begin()
            _KNOWN.pop(self._module(), None)


_KNOWN: weakref.WeakKeyDictionary[Any, WatchedStart] = weakref.WeakKeyDictionary()


def expect_start(model: nn.Module, watch: Watch, device: StartDevice | None = None) -> WatchedStart:
    """Return what will know the start of a module's training, one for all that ask.

    Args:
        model: The module.
        watch: Calls what it is given right before a checkpoint is loaded into the module, until what it returns.
        device: Where to keep the weights, None for where others say.

    Raises:
        ValueError: If somebody else has asked for another device.
    """
    start = _KNOWN.get(model)
    if start is None:
        start = _KNOWN[model] = WatchedStart(model, watch)
    if device is not None and start.device_asked not in (None, device):
        raise ValueError(
            f"Expected `start_device` to be {start.device!r}, as of the callback before, got {device!r}: there is one "
            "copy of the start for all. Give both the same."
        )
    if device is not None:
        start.device = start.device_asked = device
    start.holders += 1
    return start


@torch.no_grad()
def squared_distances(
    params: Sequence[Tensor], starts: Iterable[Tensor], shards: Mapping[int, ProcessGroup] | None = None
) -> Tensor:
    r"""Return $\lVert w - w_0 \rVert_2^2$ of each parameter, with temporaries of one parameter at a time.

    Args:
        params: Parameters w, sharded ones too.
        starts: What this process holds of each $w_0$.
        shards: The process group that FSDP1 has cut a parameter over, by its `id`.

    >>> squared_distances([torch.tensor([3.0])], [torch.tensor([1.0])])
    tensor([4.], dtype=torch.float64)
    """
    return _squares(
        params, (local_part(p) - start.to(p.device) for p, start in zip(params, starts, strict=True)), shards
    )


@torch.no_grad()
def local_squared_distances(params: Sequence[Tensor], starts: Iterable[Tensor]) -> Tensor:
    """Return `squared_distances` of what this process holds alone.

    >>> local_squared_distances([torch.tensor([3.0])], [torch.tensor([1.0])])
    tensor([4.], dtype=torch.float64)
    """
    moved = (local_part(param) - start.to(param.device) for param, start in zip(params, starts, strict=True))
    sums = [squared_norms([one.detach()]) for one in moved]
    return torch.cat(sums) if sums else torch.zeros(0)


def _squares(
    params: Sequence[Tensor], values: Iterable[Tensor], shards: Mapping[int, ProcessGroup] | None = None
) -> Tensor:
    sums = [squared_norms([value.detach()]) for value in values]
    if not sums:
        return torch.zeros(0)
    return sum_over_shards(torch.cat(sums), params, [(shards or {}).get(id(param)) for param in params])


@torch.no_grad()
def _copy(param: Tensor) -> Tensor:
    return local_part(param).detach().clone()
