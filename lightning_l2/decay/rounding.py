r"""How decay is rounded to the number format of the weights.

A step of decay takes the share $s = \eta \lambda$ of a weight. Where s is below a quarter of the format's epsilon (bf16
2^-9, fp16 2^-12, fp32 2^-25), $w - s w$ rounds to w, and decay does nothing at all.

============  ========================================================================================================
`rounding`    what it does
============  ========================================================================================================
`nearest`     what torch does
`accumulate`  saves shares up, $S \leftarrow 1 - (1 - S)(1 - s)$, and takes S once it is worth a rounding (bf16 2^-6,
              fp16 2^-9, fp32 2^-16)
`stochastic`  rounds $(1 - s) w$ up or down with the probabilities that make it right on average, in each step
============  ========================================================================================================

Source: Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192, 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_l2.param_groups.decay_groups import DecayGroups
    from lightning_l2.param_groups.parts import DecayGroup

Rounding: TypeAlias = Literal["nearest", "accumulate", "stochastic"]
Share: TypeAlias = float | Tensor

_WORTH_A_ROUNDING = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-16}
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# Elements that stochastic rounding has temporaries of.
_PIECE = 1 << 18


class Accumulate:
    r"""Save shares up: $S \leftarrow 1 - (1 - S)(1 - s)$, then $w \leftarrow (1 - S) w$ once S is worth a rounding.

    A group saves up for all its parameters of a dtype. Those that have no gradient when it is taken don't decay then.

    Args:
        groups: The parts of the groups of an optimizer.

    >>> from lightning_l2.param_groups.decay_groups import decay_groups
    >>> optimizer = torch.optim.SGD([torch.ones(1, dtype=torch.bfloat16)])
    >>> accumulate = Accumulate(decay_groups(optimizer))
    >>> [round(share, 4) for _ in range(3) for _, share in accumulate.due([0.006])]
    [0.0, 0.0, 0.0179]
    """

    def __init__(self, groups: DecayGroups) -> None:
        self._groups = groups
        self._saved: dict[str, Share] = {}
        self._version = -1
        self._parts: list[tuple[int, _Part]] = []

    def due(self, shares: Sequence[Share]) -> list[tuple[list[Tensor], Share]]:
        """Save up what a step takes of each group, and return what is due now of which parameters."""
        if self._version != self._groups.version or any(part.is_stale for _, part in self._parts):
            groups = self._groups.groups
            self._parts = [(index, part) for index, group in enumerate(groups) for part in _parts_of(group)]
            self._version = self._groups.version
        due = []
        for index, (key, dtype, params) in self._parts:
            before = self._saved.get(key, 0.0)
            # 1 - s rounds to 1 where a device knows s in fp32
            saved = before + (1 - before) * shares[index]
            is_due = saved >= _WORTH_A_ROUNDING.get(dtype, 0.0)
            # a share that is known to a device alone is compared there
            due.append((params, saved * is_due))
            self._saved[key] = saved * ~is_due if isinstance(is_due, Tensor) else saved * (not is_due)
        return due

    def state_dict(self) -> dict[str, float]:
        """Return what is saved up, by group and dtype."""
        return {key: float(saved) for key, saved in self._saved.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up what `state_dict` returned."""
        self._saved = dict(state)


class Stochastic:
    r"""Round up or down with the probabilities that make the result right on average.

    The random numbers of a parameter follow from the seed, the step and its place in the optimizer: they touch no other
    random state, replicas of a parameter get the same ones, and a resumed run goes on with the ones to come.

    Args:
        seed: Of the random numbers.

    Source: Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192, 2020.

    >>> weights = torch.ones(10_000, dtype=torch.bfloat16)
    >>> Stochastic(seed=0).subtract([weights], [weights.float()], [0.001])
    >>> sorted(set(weights.tolist())), round(weights.double().mean().item(), 3)
    ([0.99609375, 1.0], 0.999)
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._step = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def subtract(self, weights: Sequence[Tensor], of: Sequence[Tensor], shares: Sequence[Share]) -> None:
        r"""Step in place: $w \leftarrow w - s v$, rounded from a wider format.

        Args:
            weights: Dense tensors w; what has no wider format here is rounded to the nearest.
            of: What to take a share of, v; of the same shapes.
            shares: Shares s, one for each.
        """
        self._step += 1
        for place, (weight, value, share) in enumerate(zip(weights, of, shares, strict=True)):
            generator = self._generator(weight.device, place)
            # pieces keep the temporaries small
            is_flat = weight.is_contiguous() and value.is_contiguous()
            for piece, of_piece in zip(*map(_pieces, (weight, value)), strict=True) if is_flat else [(weight, value)]:
                self._round(piece, of_piece, share, generator)

    def state_dict(self) -> dict[str, int]:
        """Return the seed and how many steps were made."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up what `state_dict` returned."""
        self._seed, self._step = state["seed"], state["step"]

    def _generator(self, device: torch.device, place: int) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device=device)
        return generator.manual_seed(hash((self._seed, self._step, place)) % 2**63)

    def _round(self, weight: Tensor, value: Tensor, share: Share, generator: torch.Generator) -> None:
        wider = _WIDER.get(weight.dtype)
        if wider is None:
            weight.sub_(value * share)
            return
        # infinity less a share of it is not a number
        exact = weight.to(wider)
        exact = torch.where(exact.isinf(), exact, exact - share * value.to(wider))
        nearest = exact.to(weight.dtype)
        # of two neighbours in a format, the one further from 0 has the next larger pattern of bits
        away = torch.where(exact.abs() > nearest.abs().to(wider), 1, -1)
        bits = nearest.view(_BITS[weight.dtype])
        other = (bits + away.to(bits.dtype)).view(weight.dtype)
        rest = (exact - nearest.to(wider)).abs() / (other.to(wider) - nearest.to(wider)).abs()
        chance = torch.rand(exact.shape, generator=generator, device=exact.device)
        weight.copy_(torch.where((chance < rest) & (exact != nearest.to(wider)), other, nearest))


class _Part(NamedTuple):
    """The parameters of a group that have one dtype, and what it is called."""

    key: str
    dtype: torch.dtype
    params: list[Tensor]

    @property
    def is_stale(self) -> bool:
        """Whether somebody has given the parameters another dtype."""
        return self.params[0].dtype != self.dtype


def _parts_of(group: DecayGroup) -> list[_Part]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for param in group.params:
        by_dtype.setdefault(param.dtype, []).append(param)
    return [_Part(f"{group.name}/{dtype}", dtype, params) for dtype, params in by_dtype.items()]


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.view(-1), _PIECE)
