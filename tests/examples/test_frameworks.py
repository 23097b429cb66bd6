"""The recipes for the training loops of other libraries, and the batches that these loops get."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from scripts import Outcome, run_script
from waiting import PATIENCE

for name in ("accelerate", "lightning", "transformers"):
    if find_spec(name) is None:  # looked for, not imported: that takes seconds in every process that collects tests
        pytest.skip("needs the extra [frameworks]", allow_module_level=True)

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "examples" / "frameworks"

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

pytestmark = pytest.mark.slow


def output_of_torchrun(*command: str) -> str:
    # Without the folders of tests: one of them has the name of a library.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ["PYTHONPATH"]])}
    ended = subprocess.run(
        [sys.executable, *TORCHRUN, *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def check_that_it_learned(output: str) -> None:
    found = re.search(r"loss (\S+) -> (\S+) in 60 steps", output)
    assert found is not None, output
    assert float(found[2]) < 0.7 * float(found[1])


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what on_two_ranks.py prints on two ranks, with the environment variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def run(rank: int) -> Outcome:
        directory = tmp_path_factory.mktemp(f"rank-{rank}")
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        return run_script(HERE / "on_two_ranks.py", directory=directory, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, range(2)))
    assert [rank.returncode for rank in ended] == [0, 0], "".join(rank.stderr for rank in ended)
    return "".join(rank.stdout for rank in ended)


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
    check_that_it_learned(output_of_torchrun(str(RECIPES / "torchrun_ddp.py"), "--steps", "60"))


def test_lightning_with_processes_that_read_one_buffer(tmp_path: Path) -> None:
    arguments = ["--steps", "60", "--accelerator", "cpu", "--devices", "2"]
    ended = run_script(RECIPES / "lightning_fit.py", *arguments, directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    check_that_it_learned(ended.stdout)
