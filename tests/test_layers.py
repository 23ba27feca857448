"""The architecture is a test: imports run downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_l2"
TORCH_FREE = {"arguments", "schedules", "convert"}
OPTIONAL = {"matplotlib", "optuna", "rich", "jsonargparse", "tensorboard", "yaml", "pandas", "sklearn"}
BENEATH_CALLBACKS = {"trainer_access", "training_length", "constraints_in_force"}
LIGHTNING = {"callbacks", "mixin", "__main__", "__init__"}


def modules() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return what a file imports, type-checking imports aside: they don't run."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(ast.Module(block.body, []))
    }
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""}
    return names


def is_lightning(name: str) -> bool:
    return name.split(".")[0] in {"lightning", "pytorch_lightning"}


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("lightning_l2.")}


@pytest.mark.parametrize("module", [name for name in modules() if name.split("/")[0] in TORCH_FREE])
def test_the_mathematics_needs_no_torch(module: str) -> None:
    for name in imports(modules()[module]):
        assert name.split(".")[0] not in {"torch", "lightning", "torchmetrics"}
        if name.startswith("lightning_l2."):
            assert name.split(".")[1] in TORCH_FREE


@pytest.mark.parametrize("module", [name for name in modules() if name.split("/")[0] not in LIGHTNING])
def test_only_the_last_block_knows_lightning(module: str) -> None:
    path = modules()[module]
    if module.split("/")[0] != "search":  # which drives Trainers, as its users do
        assert not any(map(is_lightning, imports(path)))
    assert not ours(path) & {"callbacks", "mixin", "__main__"}


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("callbacks/")])
def test_callbacks_do_not_know_each_other(module: str) -> None:
    used = {name for name in imports(modules()[module]) if name.startswith("lightning_l2.callbacks.")}
    assert not {name for name in used if name.split(".")[-1] not in BENEATH_CALLBACKS}


@pytest.mark.parametrize("module", list(modules()))
def test_extras_are_imported_where_used(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(modules()[module], top_level_only=True)} & OPTIONAL


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {
            found
            for name in imports(path)
            for found in (name.removeprefix("lightning_l2.").replace(".", "/"),)
            if found in modules()
        }
        for module, path in modules().items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for found in graph[module]:
                visit(found, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", list(modules()))
def test_type_hints_of_dataclasses_can_be_read(module: str) -> None:
    # Python 3.10 can't evaluate the annotation `_: KW_ONLY`, so neither our checks nor jsonargparse see any type
    assert "KW_ONLY" not in modules()[module].read_text()


def test_private_names_of_lightning_are_in_one_place() -> None:
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if "trainer" in owner or "pl_module" in owner:
                    assert module == "callbacks/trainer_access", f"{module}: {owner}.{node.attr}"
