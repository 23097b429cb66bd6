"""Runs the recipes for other libraries' training loops as a user would, and looks at what those loops are given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

pytest.importorskip("accelerate", reason="needs the extra [frameworks]")
pytest.importorskip("lightning", reason="needs the extra [frameworks]")

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "examples" / "frameworks"

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

pytestmark = pytest.mark.slow


def output_of(*command: str) -> str:
    # Of the folders of tests only the support: one of the others has the name of a library.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "support"), str(HERE.parents[1])])}
    ended = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def check_that_it_learned(output: str) -> None:
    found = re.search(r"loss (\S+) -> (\S+) in 60 steps", output)
    assert found is not None, output
    assert float(found[2]) < 0.7 * float(found[1])


@pytest.fixture(scope="module")
def on_two_ranks() -> str:
    """Return what on_two_ranks.py prints on two ranks."""
    return output_of(*TORCHRUN, str(HERE / "on_two_ranks.py"))


@pytest.mark.parametrize("recipe", ["hf_trainer.py", "accelerate_loop.py"])
def test_recipe_on_two_ranks(on_two_ranks: str, recipe: str) -> None:
    check_that_it_learned(on_two_ranks.partition(f"recipe {recipe}")[2])


@pytest.mark.parametrize("way", ["streams", "dispatched", "split", "dispatched batches"])
def test_accelerate_gives_each_rank_chunks_of_its_own(on_two_ranks: str, way: str) -> None:
    found = re.findall(rf"^{way}: rank (\d), (\d+) chunks, (.*)$", on_two_ranks, re.MULTILINE)
    assert [rank for rank, _, _ in sorted(found)] == ["0", "1"], on_two_ranks
    assert {chunks for _, chunks, _ in found} == {"4" if way == "split" else "8"}
    assert len({drawn for _, _, drawn in found}) == 2, "both ranks have the same chunks"


def test_the_trainer_gives_each_rank_whole_chunks(on_two_ranks: str) -> None:
    assert re.findall(r"^trainer: (\d+) chunks$", on_two_ranks, re.MULTILINE) == ["8"] * 6


def test_distributed_data_parallel() -> None:
    check_that_it_learned(output_of(*TORCHRUN, str(RECIPES / "torchrun_ddp.py"), "--steps", "60"))


def test_lightning_with_processes_that_read_one_buffer() -> None:
    arguments = ["--steps", "60", "--accelerator", "cpu", "--devices", "2"]
    check_that_it_learned(output_of(str(RECIPES / "lightning_fit.py"), *arguments))
