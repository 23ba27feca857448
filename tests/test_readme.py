"""What the README says is true: its code runs, its names exist, its figures are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import lightning_l2

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_yaml_blocks_parse_and_name_what_exists(text: str) -> None:
    assert yaml.safe_load(text)
    for path in re.findall(r"lightning_l2(?:\.\w+)+", text):
        found = lightning_l2
        for name in path.split(".")[1:]:
            found = getattr(found, name)


PAGES = ["README.md", "CONTRIBUTING.md", "tests/README.md", "tests/benchmarks/README.md", "examples/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    path = Path(__file__).parent.parent / page
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", path.read_text())
    assert targets or page.startswith("tests/benchmarks")
    for target in targets:
        assert (path.parent / target).exists(), target


def test_named_tests_are_there() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"`(tests/[\w/.]+)`", README):
        assert (root / target).exists(), target


def test_it_is_read_in_ten_minutes() -> None:
    assert len(README.encode()) <= 12_000


def test_every_recipe_is_in_the_gallery() -> None:
    folder = Path(__file__).parent.parent / "examples"
    gallery = (folder / "README.md").read_text()
    assert {f"recipes/{path.name}" for path in (folder / "recipes").iterdir()} == set(
        re.findall(r"\]\((recipes/[\w.]+)\)", gallery)
    )
    for example in folder.glob("*.py"):
        assert f"examples/{example.name}" in gallery or example.stem.endswith("_figure")


def test_citations_are_a_citation_file() -> None:
    citation = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())
    assert citation["version"] == lightning_l2.__version__
    assert all(reference["title"] and reference["authors"] for reference in citation["references"])


def test_public_names_exist() -> None:
    for name in lightning_l2.__all__:
        assert getattr(lightning_l2, name).__doc__, name


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
