"""Weight decay from the spectra of the weight matrices (AlphaDecay)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_l2.adaptive.selection import HEAD, base_weight_decay, matches
from lightning_l2.arguments import check_at_least, check_not_negative, check_pattern, check_types
from lightning_l2.schedules.base import blend
from lightning_l2.schedules.feedback import FeedbackSchedule, OptimizerLike
from lightning_l2.sharding import whole


@final
@dataclass(frozen=True)
class AlphaDecay(FeedbackSchedule):
    """Decay matrices the more, the less they have learnt, as their spectra tell.

    $multiplier = s_min + (s_max - s_min) * (alpha - min(alpha)) / (max(alpha) - min(alpha))$, with `alpha` the Hill
    exponent of a matrix (`hill_exponent`) and the extremes over all measured matrices of the optimizer. A heavy tail
    (small alpha) is a sign of learnt features and is decayed less.

    Measured are matrices and convolution kernels with at least `min_eigenvalues` eigenvalues, in groups with a base
    weight decay above 0 that `exclude` doesn't find. A group's multiplier comes from the mean alpha of its matrices;
    1 for a group without any. So it is the paper's method where each matrix has a group of its own:
    `WeightDecay(rules="per_matrix")`, or `DecayRule(..., per_parameter=True)`; a step then costs more, as said there.

    Reads the weights only, of any optimizer that holds matrices (not flattened ones, as FSDP1 makes).
    The spectra are computed in the first step and every `every_n_steps`, with one transfer of the exponents beside
    what the decomposition itself needs; no other step touches a tensor.

    The linear map, the factors 2/3 and 3, the 500 steps and the 50 eigenvalues are those of the authors' code. It
    leaves out the first and the last linear layer of the network, whatever they are called; give these a rule whose
    name `exclude` finds to do the same. Its alpha counts the eigenvalue that the tail is measured from as one of the
    tail; the paper's equation, which holds here, doesn't. The multipliers are the same for odd numbers of eigenvalues
    and differ by up to about 0.2 for even ones.

    Args:
        s_min: Multiplier of the heaviest tail, dimensionless, at least 0.
        s_max: Multiplier of the lightest tail, dimensionless, at least `s_min`; the authors use 3 to 5 with Adam, 5
            with AdamW.
        every_n_steps: Optimizer steps from one measurement to the next, at least 1.
        min_eigenvalues: Matrices with fewer eigenvalues (their smaller side) are not measured, at least 2.
        exclude: Regular expression for names of rules (or groups) that keep their weight decay; None measures all.

    Raises:
        ValueError: If an argument is out of its range; if no matrix of the optimizer can be measured.

    Source: He et al., "AlphaDecay: Module-wise Weight Decay for Heavy-Tailed Balancing in LLMs", arXiv 2506.14562,
    2025.

    >>> generator = torch.Generator().manual_seed(0)
    >>> light = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    >>> heavy = torch.nn.Parameter(light.detach() @ light.detach() @ light.detach())
    >>> optimizer = torch.optim.AdamW([{"params": [light]}, {"params": [heavy]}])
    >>> AlphaDecay(s_min=0.5, s_max=2.0).multipliers(optimizer, {}, {})
    [2.0, 0.5]
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "gradients"

    s_min: float = field(default=2 / 3, kw_only=True)
    s_max: float = field(default=3.0, kw_only=True)
    every_n_steps: int = field(default=500, kw_only=True)
    min_eigenvalues: int = field(default=50, kw_only=True)
    exclude: str | None = field(default=HEAD, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_pattern(exclude=self.exclude)
        check_not_negative(s_min=self.s_min, s_max=self.s_max)
        if self.s_min > self.s_max:
            raise ValueError(f"Expected `s_min` to be at most `s_max`, {self.s_max}, got {self.s_min}.")
        check_at_least(1, every_n_steps=self.every_n_steps)
        check_at_least(2, min_eigenvalues=self.min_eigenvalues)

    def check(self, optimizer: OptimizerLike) -> None:
        """Refuse an optimizer without a matrix that is large enough."""
        if not any(self._matrices(group) for group in optimizer.param_groups):
            raise ValueError(
                f"AlphaDecay reads the spectra of weight matrices, but {type(optimizer).__name__} holds none with "
                f"{self.min_eigenvalues} eigenvalues or more in a decayed group that `exclude` {self.exclude!r} "
                "leaves in. Lower `min_eigenvalues`, or keep matrices unflattened (FSDP2 instead of FSDP1)."
            )

    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        """Return the multipliers measured last, and measure first when it is time to."""
        step = state.get("step", 0)
        if step % self.every_n_steps == 0 or len(state["multipliers"]) != len(optimizer.param_groups):
            state["multipliers"] = self._measure(optimizer)
        state["step"] = step + 1
        return list(state["multipliers"])

    @torch.no_grad()
    def _measure(self, optimizer: OptimizerLike) -> list[float]:
        matrices = [self._matrices(group) for group in optimizer.param_groups]
        measured = [hill_exponent(matrix) for group in matrices for matrix in group]
        values = iter(torch.stack([alpha.to(measured[0]) for alpha in measured]).tolist() if measured else [])
        alphas = [[alpha for alpha in islice(values, len(group)) if math.isfinite(alpha)] for group in matrices]
        known = [alpha for group in alphas for alpha in group]
        if not known or min(known) == max(known):
            return [1.0] * len(matrices)
        low, span = min(known), max(known) - min(known)
        return [
            blend(self.s_min, self.s_max, (math.fsum(group) / len(group) - low) / span) if group else 1.0
            for group in alphas
        ]

    def _matrices(self, group: Mapping[str, Any]) -> list[Tensor]:
        if base_weight_decay(group) <= 0.0 or matches(self.exclude, group):
            return []
        return [
            weight
            for weight in group["params"]
            if weight.ndim >= 2 and self._eigenvalues(weight) >= self.min_eigenvalues
        ]

    @staticmethod
    def _eigenvalues(weight: Tensor) -> int:
        return min(weight.shape[0], weight.shape[1]) * math.prod(weight.shape[2:])


def hill_exponent(weight: Tensor) -> Tensor:
    r"""Return the Hill estimate of the exponent of a weight's spectral tail.

    With the `n` eigenvalues `l_1 <= ... <= l_n` of $W^T W$ (of complex weights $W^H W$) and `k = n // 2`:
    $alpha = 1 + k / \sum_{i=1..k} \ln(l_{n-i+1} / l_{n-k})$. The eigenvalues of a convolution are those of the matrices
    at all positions of its kernel. Eigenvalues below the precision of a decomposition count as that precision.

    Args:
        weight: Matrix `(out, in)` or convolution kernel `(out, in, ...)`, at least 2 eigenvalues.

    Returns:
        The exponent, shape `()`, float64, above 1; not a number for a weight that is 0 or not
        finite.

    Source: Hill, "A Simple General Approach to Inference About the Tail of a Distribution", Annals of Statistics 3,
    1975; for weight matrices Zhou et al., "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network
    Training", arXiv 2312.00359, 2023.

    >>> round(hill_exponent(torch.diag(torch.tensor([1.0, 1.0, 2.0, 4.0]))).item(), 4)
    1.4809
    """
    matrix = whole(weight).detach()
    # MPS has neither float64 nor eigenvalues.
    dtype = torch.complex128 if matrix.is_complex() else torch.float64
    wide = matrix.to("cpu" if matrix.device.type == "mps" else matrix.device, dtype)
    # A decomposition raises on what is not finite; of zeros, the exponent is not a number.
    wide = torch.where(wide.isfinite().all(), wide, 0.0)
    matrices = wide.reshape(*wide.shape[:2], -1).permute(2, 0, 1)
    matrices = matrices if wide.shape[0] <= wide.shape[1] else matrices.mT
    # The Gram matrix of the smaller side in float64 is several times faster than singular values in float32, and its
    # eigenvalues have more correct digits.
    eigenvalues = torch.linalg.eigvalsh(matrices @ matrices.mH).flatten().sort().values
    floor = eigenvalues[-1] * max(matrices.shape[-2:]) * torch.finfo(torch.float64).eps
    logs = torch.log(torch.maximum(eigenvalues, floor))
    k = len(logs) // 2
    return 1.0 + k / (logs[-k:] - logs[-k - 1]).sum()
