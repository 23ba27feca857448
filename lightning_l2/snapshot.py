"""Keep weights, random states, data and other objects during a trial training, and put them back bit for bit."""

from __future__ import annotations

import copy
import random
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler


class Snapshot:
    """Weights, buffers, gradients and `requires_grad` of modules, kept in CPU memory to be put back bit for bit.

    Args:
        module: the module whose tensors are kept.
        parameters: further tensors to keep, such as an optimizer's own.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before, snapshot = layer.weight.item(), Snapshot(layer)
        >>> _ = nn.init.constant_(layer.weight, 7.0)
        >>> snapshot.restore()
        >>> layer.weight.item() == before
        True
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor] = ()) -> None:
        unique = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers(), *parameters)}
        self.tensors = list(unique.values())
        # A copy also where the tensor is in CPU memory already.
        self._values = [tensor.detach().to("cpu", copy=True) for tensor in self.tensors]
        self._gradients = [None if tensor.grad is None else tensor.grad.to("cpu", copy=True) for tensor in self.tensors]
        self._trainable = [tensor.requires_grad for tensor in self.tensors]

    def restore(self) -> None:
        """Put everything back; the tensors stay the same objects in the same memory."""
        state = zip(self.tensors, self._values, self._gradients, self._trainable, strict=True)
        with torch.no_grad():
            for tensor, value, gradient, trainable in state:
                tensor.copy_(value)
                tensor.grad = None if gradient is None else gradient.to(tensor.device, copy=True)
                tensor.requires_grad_(trainable)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (the CPU and all CUDA devices) back afterwards, come what may.

    Example:
        >>> with random_state_kept():
        ...     once = torch.rand(1)
        >>> torch.equal(once, torch.rand(1))
        True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def working_on_copies(
    deep: Iterable[object],
    *,
    data: Iterable[object] = (),
    shallow: Iterable[object] = (),
    shared: Iterable[object] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[dict[int, Any]]:
    """Let objects keep their identity but work on copies of their attributes; put the originals back afterwards.

    So lists, counters, generators and whatever else is reached from an attribute are untouched, and references
    between the objects hold. An attribute that can't be copied, such as a lock or an open file, is used as it is.

    Args:
        deep: objects whose attributes are copied with all that they reach.
        data: the same, less tensors and arrays, which may be large and are only read.
        shallow: objects whose attributes are put back, but not copied.
        shared: objects that are never copied, wherever they are reached; all of the above aren't either.
        overrides: attributes of `deep` and `data` that are not copied but have this value meanwhile.

    Yields:
        The memo for `copy.deepcopy`, to copy further objects consistently.

    Example:
        >>> class Counter:
        ...     def __init__(self):
        ...         self.seen = [1]
        >>> counter = Counter()
        >>> with working_on_copies([counter]):
        ...     counter.seen.append(2)
        >>> counter.seen
        [1]
    """
    deep, data, shallow = list(deep), list(data), list(shallow)
    originals = [(holder, dict(vars(holder))) for holder in (*deep, *data, *shallow)]
    arrays = [array for holder in data for value in vars(holder).values() for array in _arrays_in(value)]
    memo: dict[int, Any] = {id(item): item for item in (*deep, *data, *shallow, *shared, *arrays)}
    copies = [(holder, _copied_attributes(holder, memo, overrides or {})) for holder in (*deep, *data)]
    try:
        for holder, attributes in copies:
            _set_attributes(holder, attributes)
        yield memo
    finally:
        for holder, attributes in originals:
            _set_attributes(holder, attributes)


def data_holders(sources: Any, skip: Iterable[str] = ()) -> list[object]:
    """Return the loaders, samplers and data sets that are reached from some data, each once.

    Args:
        sources: loaders, data modules, or lists and dicts of them.
        skip: attributes that are not followed.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> [type(holder).__name__ for holder in data_holders([DataLoader(TensorDataset(torch.ones(2)))])]
        ['DataLoader', 'TensorDataset', 'SequentialSampler', 'BatchSampler']
    """
    found: dict[int, object] = {}
    skip = set(skip)

    def visit(item: Any) -> None:
        for entry in item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ():
            visit(entry)
        if isinstance(item, Dataset | Sampler | DataLoader) and id(item) not in found:
            found[id(item)] = item
            for name, value in vars(item).items():
                if name not in skip:
                    visit(value)

    for source in sources:
        visit(vars(source) if hasattr(source, "train_dataloader") else source)
    return list(found.values())


def _arrays_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _arrays_in(entry)


def _copied_attributes(holder: object, memo: dict[int, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    is_torchs_own = isinstance(holder, nn.Module) and type(holder).__module__.partition(".")[0] == "torch"
    attributes: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if name in overrides:
            attributes[name] = overrides[name]
        elif is_torchs_own:
            # Layers keep nothing but parameters and buffers; wrappers hold what must not be copied.
            attributes[name] = copy.copy(value) if isinstance(value, dict) else value
        else:
            attributes[name] = _copied(value, memo)
    return attributes


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    attempt: Any = ChainMap({}, memo)
    try:
        result = copy.deepcopy(value, attempt)
    except Exception:
        # Whatever an object's own way to be copied raises; half of its parts may be in the attempt.
        return value
    # The objects that deepcopy keeps alive so that their numbers stay theirs.
    memo.setdefault(id(memo), []).extend(attempt.maps[0].pop(id(attempt), ()))
    memo.update(attempt.maps[0])
    return result


def _set_attributes(holder: object, attributes: Mapping[str, Any]) -> None:
    vars(holder).clear()
    vars(holder).update(attributes)
