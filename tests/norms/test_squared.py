"""Norms against float64 sums, on every kind of tensor."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_l2.norms import l2_norms, squared_norms
from lightning_l2.norms.inner_products import local_inner_products
from lightning_l2.norms.layout import BLOCK

HALVES = [torch.bfloat16, torch.float16]
CONTENTS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(n)),
    "constant": lambda n: torch.full((n,), 0.0577),  # the worst of 300 constants for a sum of fp32 squares
    "growing": lambda n: torch.linspace(1e-3, 3.0, n),
}


def reference(tensor: Tensor) -> float:
    """The norm, by float64 sums of a million squares each."""
    parts = [block.double().square().sum() for block in tensor.reshape(-1).split(2**20)]
    return math.sqrt(math.fsum(part.item() for part in parts))


def norm(tensor: Tensor) -> float:
    return l2_norms({"tensor": tensor})["tensor"].item()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 5000, 16_384, 16_385, BLOCK, BLOCK + 1, 1_000_003, 2**24])
def test_accuracy(size: int, dtype: torch.dtype, content: str) -> None:
    if size == 2**24 and content == "growing":
        size += 2**24 + 77  # 33.5 million, in no way round
    tensor = CONTENTS[content](size).to(dtype)
    assert norm(tensor) == pytest.approx(reference(tensor), rel=1e-6 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("shape", [(64, 4096), (4096, 64), (3, 100_000), (100, 100)], ids=str)
def test_accuracy_does_not_depend_on_the_length_of_rows(shape: tuple[int, ...]) -> None:
    tensor = CONTENTS["constant"](math.prod(shape)).view(shape)
    assert norm(tensor) == pytest.approx(reference(tensor), rel=5e-7)


def test_torchs_own_norm_is_not_that_accurate() -> None:
    """Why a sum over one long row would not do."""
    tensor = CONTENTS["constant"](2**24)
    assert abs(torch.linalg.vector_norm(tensor).item() / reference(tensor) - 1) > 1e-4


def test_67_million() -> None:
    tensor = torch.full((2**26,), 0.0577)
    assert norm(tensor) == pytest.approx(2**13 * tensor[0].item(), rel=1e-6)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda t: t.view(600, 1000),
    "transposed": lambda t: t.view(600, 1000).t(),
    "permuted": lambda t: t.view(60, 10, 1000).permute(2, 0, 1),
    "kernel": lambda t: t.view(1000, 200, 3, 1),
    "channels last": lambda t: t.view(100, 240, 5, 5).to(memory_format=torch.channels_last),
    "every other column": lambda t: t.view(600, 1000)[:, ::2],
    "slice of rows": lambda t: t.view(600, 1000)[7:402],
    "slice of columns": lambda t: t.view(600, 1000)[:, 3:998],
    "repeated": lambda t: t[:1000].expand(300, 1000),
    "one number repeated": lambda t: t[:1].expand(300_000),
    "offset": lambda t: t[5:],
    "flipped": lambda t: t.flip(0),
    "negated view": lambda t: torch._neg_view(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](CONTENTS["normal"](600_000).to(dtype))
    assert norm(tensor) == pytest.approx(reference(tensor), rel=1e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.int8, torch.complex64], ids=str)
def test_empty_and_scalar(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.full(shape, 3).to(dtype)
    assert norm(tensor) == (3.0 if shape == () else 0.0)


def test_several_empty_tensors_and_scalars_among_others() -> None:
    tensors = [
        torch.zeros(0),
        torch.ones(4),
        torch.zeros(0),
        torch.zeros(3, 0).half(),
        torch.ones(4),
        torch.ones(9).half(),
        torch.tensor(2.0),
        torch.tensor(3.0),
    ]
    assert squared_norms(tensors).tolist() == [0.0, 4.0, 0.0, 0.0, 4.0, 9.0, 4.0, 9.0]
    assert local_inner_products(tensors, tensors).tolist() == [0.0, 4.0, 0.0, 0.0, 4.0, 9.0, 4.0, 9.0]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # older torch
def test_other_dtypes_and_kinds() -> None:
    whole = CONTENTS["normal"](300_000)
    sparse = torch.eye(30).to_sparse()
    tensors = {
        "complex": torch.complex(whole, whole),
        "conjugate": torch.complex(whole, whole).conj(),
        "integer": torch.arange(100),
        "byte": torch.full((300_000,), 2, dtype=torch.uint8),
        "boolean": torch.ones(9, dtype=torch.bool),
        "float8": torch.ones(300_000).to(torch.float8_e4m3fn),
        "coo": sparse,
        "coo with repeated indices": torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True),
        "leaf": torch.nn.Parameter(whole),
    }
    expected = [
        reference(whole) * math.sqrt(2),
        reference(whole) * math.sqrt(2),
        math.sqrt(sum(i * i for i in range(100))),
        2 * math.sqrt(300_000),
        3.0,
        math.sqrt(300_000),
        math.sqrt(30),
        3.0,
        reference(whole),
    ]
    norms = l2_norms(tensors)
    assert [value.item() for value in norms.values()] == pytest.approx(expected, rel=1e-6)
    assert list(norms) == list(tensors)
    assert all(value.dtype == torch.float64 and value.shape == () for value in norms.values())
    assert not any(value.requires_grad for value in norms.values())


def test_without_data() -> None:
    norms = l2_norms(
        {
            "meta": torch.empty(3, device="meta"),
            "known": torch.full((4,), 2.0),
            "lazy": torch.nn.LazyLinear(3).weight,
        }
    )
    assert math.isnan(norms["meta"])
    assert math.isnan(norms["lazy"])
    assert norms["known"] == 4.0
    assert l2_norms({}) == {}


@pytest.mark.parametrize("size", [10, 10_000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_what_is_not_finite_stays_so(size: int, dtype: torch.dtype) -> None:
    tensor = torch.ones(size, dtype=dtype)
    tensor[size // 2] = math.inf
    assert norm(tensor) == math.inf
    tensor[size // 3] = math.nan
    assert math.isnan(norm(tensor))


def test_fp16_does_not_overflow_and_small_numbers_do_not_vanish() -> None:
    assert norm(torch.full((1000,), 60_000.0, dtype=torch.float16)) == pytest.approx(60_000 * math.sqrt(1000), rel=1e-3)
    assert norm(torch.full((100_000,), 6e-8, dtype=torch.float16)) == pytest.approx(6e-8 * math.sqrt(1e5), rel=0.01)
    assert norm(torch.full((100_000,), 1e-17)) == pytest.approx(1e-17 * math.sqrt(1e5), rel=1e-6)
    assert norm(torch.full((100_000,), 1e17)) == pytest.approx(1e17 * math.sqrt(1e5), rel=1e-6)


KINDS = st.tuples(
    st.sampled_from([1, 3, 64, 600, 600, 4096, 20_000, 300_000]),
    st.sampled_from([torch.float32, torch.float32, torch.float64, *HALVES, torch.int32, torch.complex64]),
    st.sampled_from(["plain", "gaps", "transposed"]),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(KINDS, max_size=12))
def test_any_mixture_keeps_its_order(kinds: list[tuple[int, torch.dtype, str]]) -> None:
    tensors = []
    for number, (size, dtype, layout) in enumerate(kinds):
        tensor = (torch.rand(size, 2, generator=torch.Generator().manual_seed(number)) * (number + 1)).to(dtype)
        tensors.append({"plain": tensor, "gaps": tensor[:, 0], "transposed": tensor.t()}[layout])
    expected = [reference(tensor.abs()) ** 2 for tensor in tensors]
    assert squared_norms(tensors).tolist() == pytest.approx(expected, rel=2e-6)


class Watch(TorchDispatchMode):
    """Note the largest tensor that an operator makes, views aside, and every number that goes to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.to_host = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.to_host += func is torch.ops.aten._local_scalar_dense.default
        known = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        known |= {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["flat", "transposed", "gaps"])
def test_no_temporary_is_large_and_nothing_goes_to_the_host(dtype: torch.dtype, layout: str) -> None:
    flat = torch.ones(2**23, dtype=dtype)
    tensor = {"flat": flat, "transposed": flat.view(1024, -1).t(), "gaps": flat.view(1024, -1)[:, 1:]}[layout]
    with Watch() as watch:
        squared_norms([tensor, *[torch.ones(90, 90, dtype=dtype)] * 300])
    # a buffer of 1 MiB (2 MiB in float64), or a block's part of it
    assert watch.largest <= BLOCK * max(4, dtype.itemsize)
    assert watch.to_host == 0


def test_an_accelerator_is_never_waited_for() -> None:
    """Fake CUDA tensors have no data: whatever would bring some to the host raises."""
    with FakeTensorMode():
        cuda = [
            torch.empty(1000, 1000, device="cuda"),
            torch.empty(10, device="cuda", dtype=torch.bfloat16),
            torch.empty(3, device="cuda", dtype=torch.complex64),
            torch.empty(30, 30, device="cuda").t(),
        ]
        squares = squared_norms([torch.empty(7), *cuda])
        products = local_inner_products(cuda[:2], cuda[:2])
    assert squares.shape == (5,)
    assert squares.dtype == products.dtype == torch.float64
    assert squares.device.type == products.device.type == "cuda"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_inner_products(layout: str, dtype: torch.dtype) -> None:
    a = LAYOUTS[layout](CONTENTS["normal"](600_000).to(dtype))
    b = LAYOUTS[layout](CONTENTS["growing"](600_000).to(dtype))
    expected = (a.double() * b.double()).sum().item()
    scale = reference(a) * reference(b)
    assert local_inner_products([a], [b]).item() == pytest.approx(expected, abs=3e-7 * scale)
    assert local_inner_products([a], [b.contiguous()]).item() == pytest.approx(expected, abs=3e-7 * scale)


def test_sharded_norms_are_those_of_the_whole(tmp_path: Path) -> None:
    """Two gloo processes: DTensors, FSDP1's pieces and FSDP2's, on one and two mesh dimensions."""
    worker = Path(__file__).parents[1] / "processes" / "sharded_norms.py"
    command = [sys.executable, "-W", "ignore", str(worker), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(worker.parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=200, env=environment)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for case, (found, expected, collectives) in first.items():
        assert found == pytest.approx(expected, rel=1e-5 if "tracked" in case else 1e-6), case
        allowed = {"whole": 0, "replicated": 0, "partial": 1, "mesh": 2}.get(case, 1)
        assert collectives == allowed, case
