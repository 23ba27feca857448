"""Norms: speed beside reading alone and beside torch's own, accuracy, and cost by number of tensors and elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_l2.norms import squared_norms
from tests.benchmarks.timing import interleaved, medians, table

LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "1-D": torch.randn,
    "transposed matrix": lambda n: torch.randn(4096, n // 4096).t(),
    "convolution kernel": lambda n: torch.randn(n // 4096, 64, 8, 8).to(memory_format=torch.channels_last),
}


def error(tensor: Tensor, square: float) -> str:
    """Relative error of a norm against float64."""
    exact = math.fsum(block.double().square().sum().item() for block in tensor.reshape(-1).split(2**20))
    return f"{abs(math.sqrt(square / exact) - 1):.0e}"


def large(device: torch.device, million: int) -> None:
    """One large tensor: bytes read in a time, over those of `tensor.sum()`."""
    size = million * 2**20
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout, make in LAYOUTS.items():
            tensor = make(size).to(device, dtype)
            contenders: dict[str, Callable[[], object]] = {
                "sum": tensor.sum,
                "ours": lambda tensor=tensor: squared_norms([tensor]),
                "vector_norm": lambda tensor=tensor: torch.linalg.vector_norm(tensor, dtype=torch.float32),
                "foreach": lambda tensor=tensor: torch._foreach_norm([tensor]),
            }
            if device.type == "cuda":
                contenders["copy"] = tensor.clone
            found = interleaved(contenders, 9 if dtype == torch.float32 else 4, device)
            rows.append(
                [
                    f"{str(dtype)[6:]}, {layout}",
                    f"{tensor.nbytes / found['sum'] / 1e9:.1f} GB/s",
                    f"{found['sum'] / found['ours']:.2f}",
                    f"{found['sum'] / found['vector_norm']:.2f}",
                    f"{found['vector_norm'] / found['ours']:.1f}",
                    error(tensor, squared_norms([tensor]).item()),
                    error(tensor, torch.linalg.vector_norm(tensor, dtype=torch.float32).item() ** 2),
                    *([f"{found['copy'] / 2 / found['ours']:.2f}"] if "copy" in found else []),
                ]
            )
    head = ["tensor", "sum", "ours / sum", "vector_norm / sum", "faster than vector_norm", "our error", "its error"]
    head += ["ours / copy"] if device.type == "cuda" else []
    table(f"One tensor of {million} x 2^20 elements, bandwidth", head, rows)


def constant(device: torch.device, million: int) -> None:
    """Equal elements, where rounding adds up."""
    tensor = torch.full((million * 2**20,), 0.0577, device=device)
    ours, theirs = squared_norms([tensor]).item(), torch.linalg.vector_norm(tensor).item() ** 2
    print(f"\nEqual elements, {million} x 2^20: our error {error(tensor, ours)}, vector_norm's {error(tensor, theirs)}")


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            kernels += [(4 * width, inputs, 1, 1)] if block == 0 else []
            shapes += [shape for kernel in kernels for shape in (kernel, kernel[:1], kernel[:1])]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """The shapes of the smallest GPT-2's 148 parameters."""
    width = 768
    matrices = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layer = [shape for matrix in matrices for shape in (matrix, matrix[1:])] + [(width,)] * 4
    return [(50_257, width), (1024, width), *layer * 12, (width,), (width,)]


LISTS: dict[str, tuple[list[tuple[int, ...]], torch.dtype]] = {
    "300 x 64 and 300 x 64^2": ([(64, 64), (64,)] * 300, torch.float32),
    "600 x 64": ([(64,)] * 600, torch.float32),
    "200 of an MLP, 16 wide": ([(16, 16), (16,)] * 100, torch.float32),
    "200 of an MLP, 100 wide": ([(100, 100), (100,)] * 100, torch.float32),
    "200 of 200 sizes": ([(400 + index,) for index in range(200)], torch.float32),
    "200 x 256^2": ([(256, 256)] * 200, torch.float32),
    "200 x 256^2, bf16": ([(256, 256)] * 200, torch.bfloat16),
    "ResNet-50": (resnet50(), torch.float32),
    "ResNet-50, bf16": (resnet50(), torch.bfloat16),
    "GPT-2, bf16": (gpt2(), torch.bfloat16),
    "100 x 2^20": ([(1024, 1024)] * 100, torch.float32),
    "one of 2^26": ([(2**26,)], torch.float32),
}


@torch.no_grad()
def many(device: torch.device) -> None:
    """Lists of tensors: medians of the time over that of one `torch._foreach_norm` in fp32, and of `sum()` each."""
    # as after any training step, the allocator keeps what is freed: else pages are asked for anew at each call
    torch.empty(7 * 2**20, device=device)
    rows = []
    for name, (shapes, dtype) in LISTS.items():
        tensors = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
        contenders = {
            "foreach": lambda tensors=tensors: torch.stack(torch._foreach_norm(tensors, 2.0, torch.float32)),
            "sum": lambda tensors=tensors: [tensor.sum() for tensor in tensors],
            "ours": lambda tensors=tensors: squared_norms(tensors),
        }
        elements = sum(tensor.numel() for tensor in tensors)
        found = medians(contenders, max(5, min(60, 5 * 10**7 // elements)), device)
        equal = [torch.full_like(tensor, 0.0577) for tensor in tensors]
        exact = torch.stack([sum(b.double().square().sum() for b in t.view(-1).split(2**20)) for t in equal])
        ours, its = squared_norms(equal), torch.stack(torch._foreach_norm(equal, 2.0, torch.float32)).double().square()
        rows.append(
            [
                name,
                f"{found['ours'] / len(tensors) * 1e6:.2f} us",
                f"{found['ours'] / found['foreach']:.2f}",
                f"{found['sum'] / found['ours']:.2f}",
                *(f"{((squares / exact).sqrt() - 1).abs().max().item():.0e}" for squares in (ours, its)),
            ]
        )
    head = ["tensors", "ours, each", "ours / foreach", "share of sum's speed"]
    table("Lists of tensors; errors are those with equal elements", [*head, "our error", "foreach's"], rows)


def growth(device: torch.device) -> None:
    """Cost by number of elements of one tensor."""
    rows = []
    for power in range(8, 27, 2):
        tensor = torch.randn(2**power, device=device)
        found = interleaved({"ours": lambda tensor=tensor: squared_norms([tensor])}, 20, device)
        rows.append([f"2^{power}", f"{found['ours'] * 1e6:.0f} us", f"{tensor.nbytes / found['ours'] / 1e9:.1f} GB/s"])
    table("One fp32 tensor by size", ["elements", "time", "bandwidth"], rows)
