"""The architecture is a test: what stands where, and who may import whom."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import lightning_l2
from tests.processes.forked import python

PACKAGE = Path(lightning_l2.__file__).parent
TESTS = Path(__file__).parent
# from the top downwards: each imports only what stands behind it
FLOORS = [
    *("__main__", "__init__", "mixin", "callbacks", "cli", "search", "monitor", "decay", "adaptive", "metrics"),
    *("constraints", "param_groups", "plots", "trainer", "schedules", "rules", "norms", "convert", "optimizers"),
    *("sharding", "complaints", "arguments", "extras"),
]
MATHEMATICS = {"arguments", "schedules", "convert"}  # plain numbers: no torch
KNOW_LIGHTNING = {"__init__", "__main__", "mixin", "callbacks", "cli", "search", "trainer"}
LAZY = "matplotlib optuna rich jsonargparse tensorboard yaml pandas sklearn"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return what the package's files say, by name: `rules.assign`, `rules.__init__`, `metrics`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module, *, types: bool = True, top_level_only: bool = False) -> Iterator[str]:
    """Yield what a file imports; `from a import b` gives `a.b`. Imports for types don't run."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if not types and isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.Module, known: dict[str, ast.Module], **options: bool) -> set[str]:
    """Return the modules of the package that a file imports; a wing as a whole is its `__init__`."""
    found = set()
    for name in imports(tree, **options):
        if name.split(".")[0] != "lightning_l2":
            continue
        path = name.split(".")[1:]
        candidates = (".".join([*path[:size], *end]) for size in (2, 1) for end in ((), ("__init__",)))
        found.add(next((candidate for candidate in candidates if candidate in known), "__init__"))
    return found


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[0])


def test_imports_run_downwards() -> None:
    known = modules()
    upwards = [
        f"{module} -> {imported}"
        for module, tree in known.items()
        for imported in ours(tree, known)
        if floor(imported) < floor(module)
    ]
    assert not upwards


def test_imports_have_no_circle() -> None:
    known = modules()
    graph = {module: ours(tree, known) - {module} for module, tree in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for found in sorted(graph[module]):
                visit(found, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_callback_knows_another() -> None:
    known = modules()
    callbacks = {name for name in known if name.startswith("callbacks.")} - {"callbacks.__init__"}
    assert len(callbacks) >= 6
    assert not {
        name: found for name in callbacks if (found := ours(known[name], known) & {*callbacks, "callbacks.__init__"})
    }


def test_the_top_is_seen_at_a_glance() -> None:
    flat = [name for name in modules() if "." not in name and name != "__init__"]
    assert len(flat) <= 8, flat
    assert {name.split(".")[0] for name in modules()} == set(FLOORS)


def test_faces_hand_on_what_they_say() -> None:
    for face in sorted({name.split(".")[0] for name in modules() if "." in name}):
        wing = importlib.import_module(f"lightning_l2.{face}")
        assert wing.__doc__, face
        assert dir(wing) == sorted(wing.__all__), face
        for name in wing.__all__:
            origin = getattr(getattr(wing, name), "__module__", f"lightning_l2.{face}")
            assert not origin.startswith("lightning_l2") or origin.startswith(f"lightning_l2.{face}"), (face, name)


def test_modules_import_from_modules() -> None:
    """Faces are for outsiders: a module that imports a face imports all that stands behind it."""
    known = modules()
    faces = {name for name in known if name.endswith(".__init__")}
    through = {
        f"{module} -> {face.removesuffix('.__init__')}"
        for module, tree in known.items()
        if module not in faces
        for face in ours(tree, known) & faces
    }
    # these take what the user names of a face
    assert through <= {"__main__ -> cli", "callbacks.norm_plots -> plots", "plots.preview -> schedules"}


def test_optional_packages_are_imported_where_used() -> None:
    faces = sorted({name.split(".")[0] for name in modules() if "." in name})
    program = f"""
import importlib, sys
import lightning.pytorch, torchmetrics
lazy = [name for name in {LAZY!r}.split() if name not in sys.modules]
for name in ["lightning_l2", *(f"lightning_l2.{{face}}" for face in {faces})]:
    module = importlib.import_module(name)
    [getattr(module, name) for name in module.__all__]
print(*[name for name in lazy if name in sys.modules])
"""
    found = python("-c", program)
    assert found.returncode == 0, found.stderr
    assert not found.stdout.split()


def test_sharded_tensors_are_imported_where_there_are_any() -> None:
    # it takes a second that most runs don't need
    name = "torch.distributed.tensor"
    at_once = {module: set(imports(tree, types=False, top_level_only=True)) for module, tree in modules().items()}
    assert not {module for module, found in at_once.items() if any(one.startswith(name) for one in found)}


def test_the_mathematics_needs_no_torch() -> None:
    known = modules()
    for module, tree in known.items():
        if module.split(".")[0] in MATHEMATICS:
            assert not {name.split(".")[0] for name in imports(tree)} & {"torch", "lightning", "torchmetrics"}, module
            assert {name.split(".")[0] for name in ours(tree, known)} <= MATHEMATICS, module


def test_lightning_is_known_where_it_must_be() -> None:
    """Elsewhere only what users are told by is Lightning's own: the exception, and warnings of the first process."""
    found = [
        f"{module} -> {name}"
        for module, tree in modules().items()
        for name in imports(tree)
        if module.split(".")[0] not in KNOW_LIGHTNING
        if name.split(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"}
        if not name.endswith(("exceptions.MisconfigurationException", "rank_zero_warn"))
    ]
    # a picture of a YAML file needs to know which callbacks it names
    assert set(found) <= {"plots.preview -> lightning.pytorch"}


def test_private_names_of_lightning_are_in_one_place() -> None:
    found = [
        f"{module}: {ast.unparse(node)}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if "trainer" in ast.unparse(node.value) or "pl_module" in ast.unparse(node.value)
    ]
    assert found
    assert not [use for use in found if not use.startswith("trainer.")]


def test_type_hints_of_dataclasses_can_be_read() -> None:
    # Python 3.10 can't evaluate the annotation `_: KW_ONLY`, so neither our checks nor jsonargparse see any type
    assert not [path for path in PACKAGE.rglob("*.py") if "KW_ONLY" in path.read_text()]


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield where each docstring stands, and what it says."""
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    yield f"{module}: {getattr(node, 'name', 'the module')}", text


# what code doesn't have between backticks: spaces around such an operator, a caret, a norm's bars
FORMULA = re.compile(r" (?:\*\*?|/|<-) |\^|\|\||\bsqrt\(")
SOURCE = re.compile(r"^Sources?\b(.*?)(?=^Source|^$|\Z)", re.MULTILINE | re.DOTALL)


def test_formulas_are_between_dollars() -> None:
    found = [
        f"{place}: {code}"
        for place, text in docstrings()
        for code in re.findall(r"`([^`]+)`", text)
        if FORMULA.search(code)
    ]
    assert not found


def test_a_source_is_one_line_with_its_year() -> None:
    """`Source: authors, title, arXiv number, year.`; a place within it may follow the year."""
    found = [(place, match[0]) for place, text in docstrings() for match in SOURCE.finditer(text)]
    assert len(found) > 20
    wrong = [
        (place, line)
        for place, line in found
        if not (line.startswith("Source: ") and re.search(r"\b(?:19|20)\d\d\b", line) and line.rstrip().endswith("."))
        or ("arXiv" in line and not re.search(r"arXiv (?:\d{4}\.\d{5}|[a-z-]+/\d{7})\b", line.replace("\n", " ")))
    ]
    assert not wrong


def test_arguments_are_told_in_sentences() -> None:
    wrong = []
    for place, text in docstrings():
        for section in re.findall(r"^Args:\n((?:[ ]+.*\n?|\n(?=[ ]))+)", text, re.MULTILINE):
            entries = re.split(r"^    (?=\S)", section, flags=re.MULTILINE)[1:]
            told = [entry.partition(": ")[2].strip() for entry in entries]
            wrong += [(place, entry) for entry in told if not re.match(r"[A-Z`\"$0-9]", entry) or entry[-1] not in ".:"]
    assert not wrong


def test_each_module_has_a_test_of_its_name() -> None:
    without = set()
    for module in modules():
        *wing, name = module.replace("__main__", "main").split(".")
        if name != "__init__" and not TESTS.joinpath(*wing, f"test_{name}.py").exists():
            without.add(module)
    assert not without
