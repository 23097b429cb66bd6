"""The report holds what was measured against the targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import report

CASE = {"kind": "images", "trajectories": 16, "steps": 200, "batch_size": 16, "chunk_size": 16}


def write(folder: Path, topic: str, results: list[dict[str, Any]]) -> None:
    (folder / f"{topic}.json").write_text(json.dumps({"results": results}))


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    report.main(report.Config(folder))
    return capsys.readouterr().out.splitlines()


def test_a_ratio_beside_its_target_and_what_a_copy_would_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {report.OURS: 0.002, "RoundRobinWriter": 0.012, "memcpy": 0.0015}
    write(tmp_path, "inserting", [{"case": CASE, "contestant": name, "median_s": s} for name, s in times.items()])
    lines = printed(tmp_path, capsys)
    assert "0 of 1 targets met" in lines
    (line,) = (line for line in lines if line.lstrip().startswith("extend()"))
    assert line.split()[-6:] == ["at", "least", "8x", "6.00x", "no", "8.00x"]


def test_sampling_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {report.OURS: 0.001, report.SLICES: 0.0125, "one memcpy": 0.0009}
    write(
        tmp_path,
        "sampling",
        [
            {"case": CASE, "threads": 1, "contestant": name, "median_s": seconds, "batch_bytes": 7_000_000}
            for name, seconds in times.items()
        ],
    )
    lines = printed(tmp_path, capsys)
    assert "2 of 2 targets met" in lines
    assert any(line.split()[-3:] == ["12.50x", "yes", "13.89x"] for line in lines)
    assert any(line.split()[-2:] == ["0.90x", "yes"] for line in lines)
    assert (tmp_path / "sampling.png").stat().st_size > 1000


def test_what_has_no_target_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {"case": {"name": "short"}, "layout": "compact=True", "bytes_when_full": 55, "torchrl_bytes": 100}
    write(tmp_path, "memory", [held, {"lengths": "uniform", "used": 1}, {"cameras": "plain", "of_torchrl": 1.0}])
    lines = printed(tmp_path, capsys)
    assert "1 of 1 targets met" in lines
    assert any("short, compact=True" in line and "0.55x" in line for line in lines)


def test_options_of_the_buffer_beside_plain_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"plain chunks": 1e-4, "prefetch=2": 1.31e-4, **dict.fromkeys(report.OPTIONS_OF_THE_BUFFER[1:], 1.3e-4)}
    write(tmp_path, "features", [{"case": CASE, "way": way, "median_s": s} for way, s in seconds.items()])
    lines = printed(tmp_path, capsys)
    assert "3 of 4 targets met" in lines
    (line,) = (line for line in lines if "prefetch=2" in line)
    assert line.split()[-2:] == ["1.31x", "no"]


def test_a_data_loader_beside_one_that_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {f"{what}, num_workers={n}": 2e-4 for what in ("batches", "items") for n in (0, 1, 2)}
    seconds |= {"rb.sample()": 1e-4, "numbers, num_workers=1": 0.5e-4, "numbers, num_workers=2": 0.25e-4}
    write(tmp_path, "together", [{"case": CASE, "source": name, "median_s": s} for name, s in seconds.items()])
    lines = printed(tmp_path, capsys)
    assert "2 of 4 targets met" in lines  # items are as fast as batches
    (line,) = (line for line in lines if "2 workers: batches" in line)
    assert line.split()[-3:] == ["0.50x", "no", "4.00x"]


def test_without_results_it_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make bench"):
        report.main(report.Config(tmp_path))
