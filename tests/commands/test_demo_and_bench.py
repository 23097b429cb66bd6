"""The commands that show what the library does: ``demo`` and ``bench``."""

from __future__ import annotations

import re

import pytest
import torch

from embodichain_rl.cli import main

pytestmark = pytest.mark.slow


def test_demo_samples_while_it_is_stepped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--workers", "0", "--buffer-size", "2", "--batch-size", "4", "--seconds", "0.2"]) == 0
    output = capsys.readouterr().out
    assert "A batch has the shape [4, 8]" in output
    assert re.search(r"observation +\[4, 8, 4\] +float32", output)
    assert re.search(r"The buffer holds [1-9]\d* episodes", output)


def test_bench_measures_both_buffers(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        sizes = ["--trajectories", "2", "--steps", "20", "--image-size", "4", "--chunk-size", "8"]
        assert main(["bench", *sizes, "--batch-size", "4", "--seconds", "0"]) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    for call in ("sample()", "extend()"):
        assert re.search(rf"{re.escape(call)} +[\d,]+ µs +[\d,]+ µs +[\d.]+x", output)


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_the_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code
    assert len(capsys.readouterr().out.splitlines()) <= 24
