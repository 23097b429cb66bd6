"""The command line: a buffer in a file, also while it is in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from steps import make_buffer, make_trajectory

from embodichain_rl.cli import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


def test_info_verify_and_sync(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rb = make_buffer([make_trajectory(number, 3 + number) for number in range(6)], path=path)
    assert main(["buffer", "info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "trajectories: 4 of at most 4" in told
    assert "steps: 26 of at most 100" in told
    assert "ids: 2 to 5" in told
    assert "robot/arm/joints: [7] float64" in told
    assert main(["buffer", "verify", str(path)]) == 0
    assert "4 trajectories were read" in capsys.readouterr().out
    assert main(["buffer", "sync", str(path)]) == 0
    assert "4 trajectories are safe" in capsys.readouterr().out
    assert int(rb.storage.ledger.last_commit()[1]) == 6


def test_what_is_no_buffer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["buffer", "info", str(path)]) == 1
    assert "BufferNotFoundError: There is no buffer at" in capsys.readouterr().err
    make_buffer([make_trajectory(1, 4)], path=path).storage.ledger._rows[1, 0] = 700
    assert main(["buffer", "verify", str(path)]) == 1
    assert "The ledger is inconsistent" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["buffer"])


def test_of_an_empty_buffer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_buffer(path=path)
    for command in ("info", "verify", "sync"):
        assert main(["buffer", command, str(path)]) == 0
    assert "nothing was written yet" in capsys.readouterr().out
