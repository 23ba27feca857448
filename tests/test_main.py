"""`python -m lightning_l2`."""

import pytest

from lightning_l2.__main__ import main


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("search", "preview"):
        assert command in out
    assert main([]) == 2
    assert main(["find"]) == 2
    assert "There is no command 'find'." in capsys.readouterr().err
