"""Norms against float64 sums, on every kind of tensor."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_l2.norms import l2_norms, squared_norms
from lightning_l2.norms.inner_products import local_inner_products
from lightning_l2.norms.layout import BLOCK
from tests.norms.tensors import CONTENTS, HALVES, LAYOUTS, Watch, reference
from tests.processes import forked, sharded_norms


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


@pytest.mark.parametrize("size", [5, 600, 16_384, 20_001, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_ends_of_the_range(size: int, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    some = [
        limits.max,
        limits.max / 3,
        limits.tiny,
        limits.smallest_normal / 4,
        1e19,
        1.8e19,
        1e-18,
        1e-20,
        1e-22,
        1e-30,
    ]
    values = [value for value in some if torch.tensor(value, dtype=dtype).isfinite()]
    tensors = [torch.full((size,), value, dtype=dtype) for value in values]
    alternating = torch.full((size,), 1e-21, dtype=dtype)
    alternating[::3] = 1.0
    tensors += [alternating, torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)]
    expected = [tensor.double().square().sum().item() for tensor in tensors]
    assert squared_norms(tensors).tolist() == pytest.approx(expected, rel=2e-6, abs=0)
    assert [norm(tensor) for tensor in tensors] == pytest.approx([x**0.5 for x in expected], rel=1e-6, abs=0)


def test_extremes_beside_what_is_not_finite() -> None:
    tensors = [torch.full((9,), value) for value in (math.nan, 1e-30, math.inf, 1e30, 0.0)]
    squares = squared_norms(tensors).tolist()
    assert math.isnan(squares[0])
    assert squares[2] == math.inf
    assert [squares[1], squares[3], squares[4]] == pytest.approx([9e-60, 9e60, 0.0], rel=1e-6, abs=0)


@settings(max_examples=60)
@given(
    st.integers(1, 600),
    st.floats(0, 6e-4),
    st.integers(0, 511),
    st.sampled_from([512, 4096, 4100, 16_384, 100_000, 300_007]),
)
def test_no_content_makes_the_error_large(every: int, small: float, first: int, size: int) -> None:
    """Few elements that outweigh all others in the sum of squares, so that these round away where rows are long."""
    tensor = torch.full((size,), small)
    tensor[first::every] = 1.0
    assert norm(tensor) == pytest.approx(reference(tensor), rel=1e-6)


def test_rows_of_512_are_not_that_accurate() -> None:
    """Why rows are shorter."""
    tensor = torch.full((2**20,), 2.4e-4)
    tensor[::512] = 1.0
    rows = torch.linalg.vector_norm(tensor.view(-1, 512), dim=1)
    assert rows.double().square().sum().sqrt().item() != pytest.approx(reference(tensor), rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # all three warn that they will go or change
@pytest.mark.parametrize("kind", ["quantized", "nested", "jagged", "mkldnn"])
def test_tensors_whose_elements_cannot_be_read(kind: str) -> None:
    whole = torch.ones(3, 3)
    tensor = {
        "quantized": lambda: torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([whole, whole[:1]]),
        "jagged": lambda: torch.nested.nested_tensor([whole, whole[:1]], layout=torch.jagged),
        "mkldnn": lambda: whole.to_mkldnn(),
    }[kind]()
    kind = "nested" if kind == "jagged" else kind
    with pytest.raises(TypeError, match=f"dense or sparse, got a tensor that is {kind}. Leave it out, or measure what"):
        squared_norms([whole, tensor])


KINDS = st.tuples(
    st.sampled_from([1, 3, 64, 600, 600, 4096, 20_000, 300_000]),
    st.sampled_from([torch.float32, torch.float32, torch.float64, *HALVES, torch.int32, torch.complex64]),
    st.sampled_from(["plain", "gaps", "transposed"]),
)


@settings(max_examples=30)
@given(st.lists(KINDS, max_size=12))
def test_any_mixture_keeps_its_order(kinds: list[tuple[int, torch.dtype, str]]) -> None:
    tensors = []
    for number, (size, dtype, layout) in enumerate(kinds):
        tensor = (torch.rand(size, 2, generator=torch.Generator().manual_seed(number)) * (number + 1)).to(dtype)
        tensors.append({"plain": tensor, "gaps": tensor[:, 0], "transposed": tensor.t()}[layout])
    expected = [reference(tensor.abs()) ** 2 for tensor in tensors]
    assert squared_norms(tensors).tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["flat", "transposed", "gaps"])
def test_no_temporary_is_large(dtype: torch.dtype, layout: str) -> None:
    flat = torch.ones(2**23, dtype=dtype)
    tensor = {"flat": flat, "transposed": flat.view(1024, -1).t(), "gaps": flat.view(1024, -1)[:, 1:]}[layout]
    with Watch() as watch:
        squared_norms([tensor, *[torch.ones(90, 90, dtype=dtype)] * 300])
    # a buffer of 1 MiB (2 MiB in float64), or a block's part of it
    assert watch.largest <= BLOCK * max(4, dtype.itemsize)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1_000_000, 64), 1), ((8_000_000, 8), 1), ((1024, 1024), 70), ((8, 8), 3000), ((3000, 3), 2000)],
    ids=str,
)
def test_no_list_of_norms_is_large(shape: tuple[int, int], count: int) -> None:
    tensors = [torch.ones(shape)] * count
    with Watch() as watch:
        squares = squared_norms(tensors)
    assert squares.tolist() == pytest.approx([math.prod(shape)] * count, rel=1e-6)
    assert watch.largest <= 2**21


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


def test_sharded_norms_are_those_of_the_whole(tmp_path: Path) -> None:
    """Two gloo processes: DTensors, FSDP1's pieces and FSDP2's, on one and two mesh dimensions."""
    forked.ranks(sharded_norms.work, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for case, (found, expected, collectives) in first.items():
        assert found == pytest.approx(expected, rel=1e-5 if "tracked" in case else 1e-6), case
        allowed = {"whole": 0, "replicated": 0, "partial": 1, "mesh": 2}.get(case, 1)
        assert collectives == allowed, case
