"""Views in the order of memory, blocks, plain parts, and results put in order."""

import math

import pytest
import torch

from lightning_l2.norms.layout import BLOCK, at_least_fp32, block_size, blocks, in_order, memory_order, plain_part
from tests.norms.tensors import CONTENTS, LAYOUTS

GAPS = {"every other column", "slice of columns", "repeated", "one number repeated"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order(layout: str) -> None:
    tensor = LAYOUTS[layout](torch.arange(600_000.0))
    flat = memory_order(tensor)
    assert (flat is None) == (layout in GAPS)
    if flat is not None:
        assert flat.data_ptr() == tensor.data_ptr()
        assert torch.equal(flat, torch.as_strided(tensor, (tensor.numel(),), (1,)))


@pytest.mark.parametrize("dense", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_hold_each_element_once(layout: str, dense: int) -> None:
    tensor = LAYOUTS[layout](CONTENTS["normal"](600_000))
    found = list(blocks(tensor, dense))
    assert max(block.numel() for block in found) <= BLOCK * (1 if layout in GAPS else dense)
    assert all(block.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for block in found)
    together = torch.cat([block.reshape(-1) for block in found])
    assert torch.equal(together.sort().values, tensor.reshape(-1).sort().values)


def test_blocks_of_an_accelerator_are_larger() -> None:
    assert block_size(torch.empty(1)) == BLOCK
    assert block_size(torch.empty(1, device="meta")) == 64 * BLOCK


def test_blocks_of_scalars_and_empty_tensors() -> None:
    assert [block.tolist() for block in blocks(torch.tensor(3.0))] == [[3.0]]
    assert sum(block.numel() for block in blocks(torch.zeros(3, 0))) == 0


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_plain_parts() -> None:
    assert plain_part(torch.tensor([3 + 4j]).conj()).tolist() == [[3.0, -4.0]]
    assert plain_part(torch.tensor([[0.0, 2.0], [0.0, 3.0]]).to_sparse()).tolist() == [2.0, 3.0]
    assert plain_part(torch.tensor([[0.0, 2.0], [0.0, 3.0]]).to_sparse_csr()).tolist() == [2.0, 3.0]
    repeated = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True)
    assert plain_part(repeated).tolist() == [3.0]
    assert plain_part(torch.nn.LazyLinear(3).weight).is_meta
    whole = torch.ones(3)
    assert plain_part(whole) is whole


def test_the_dtype_to_square_in() -> None:
    assert at_least_fp32(torch.ones(1, dtype=torch.float64)) == torch.float64
    assert {at_least_fp32(torch.ones(1).to(dtype)) for dtype in (torch.float32, torch.float16, torch.int8)} == {
        torch.float32
    }


def test_in_order() -> None:
    numbers = [torch.tensor([10.0, 30.0]), torch.tensor([20.0], dtype=torch.float64)]
    assert in_order(numbers, [0, 2, 1]).tolist() == [10.0, 20.0, 30.0]
    assert in_order(numbers, None).tolist() == [10.0, 30.0, 20.0]
    assert in_order([], []).tolist() == []
    assert in_order([torch.tensor([math.pi], dtype=torch.float64)], None).item() == math.pi
