"""What is learned on a table, as a user runs it, but short: DAgger, randomised tables, instructions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from example_process import EXAMPLES
from scripts import run_script
from tensordict import TensorDict

for name in ("matplotlib", "tqdm", "tyro"):
    pytest.importorskip(name, reason="needs the extra [examples]")

STREAM = "stream of demonstrations"


@pytest.mark.slow
def test_dagger_trains_on_all_kinds_of_data_and_draws(tmp_path: Path) -> None:
    arguments = ["--seeds", "3", "--fixed", "4", "8", "--buffer-size", "16", "--min-trajectories", "4", "--rows", "4"]
    arguments += ["--updates", "20", "--evaluate-every", "10", "--evaluation-episodes", "2", "--batch-size", "32"]
    arguments += ["--anneal", "1", "--send-every", "1", "--start-method", "forkserver", "--out", str(tmp_path)]
    done = run_script(EXAMPLES / "training/dagger.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Success of the expert: 100\.0%", done.stdout)
    assert re.search(r"\| 4 demonstrations \| 4 \| \d+\.\d% \|", done.stdout)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [curve["data"] for curve in curves] == [
        "4 demonstrations",
        "8 demonstrations",
        STREAM,
        "DAgger on the stream",
    ]
    assert all(curve["updates"] == [10, 20] and curve["seed"] == 3 for curve in curves)
    for picture in ("comparison.png", "episode.png"):
        assert (tmp_path / picture).stat().st_size > 20_000


@pytest.mark.slow
def test_randomised_tables_are_tested_inside_and_outside_of_the_training_range(tmp_path: Path) -> None:
    arguments = ["--seeds", "3", "--fixed", "4", "8", "--buffer-size", "16", "--min-trajectories", "4", "--rows", "4"]
    arguments += ["--updates", "20", "--evaluate-every", "10", "--evaluation-episodes", "2", "--batch-size", "32"]
    arguments += ["--start-method", "forkserver", "--out", str(tmp_path)]
    done = run_script(EXAMPLES / "training/randomised.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "inside the range" in done.stdout
    assert "outside the range" in done.stdout
    for test in ("inside", "outside"):
        curves = json.loads((tmp_path / f"{test}_curves.json").read_text())
        assert [curve["data"] for curve in curves] == ["4 demonstrations", "8 demonstrations", STREAM]
        assert all(curve["updates"] == [10, 20] and curve["seed"] == 3 for curve in curves)
        for picture in ("comparison.png", "episode.png"):
            assert (tmp_path / f"{test}_{picture}").stat().st_size > 20_000


@pytest.mark.slow
def test_the_policy_that_hears_the_instruction_is_trained_in_every_way(tmp_path: Path) -> None:
    arguments = ["--seeds", "3", "--updates", "20", "--evaluation-episodes", "2", "--batch-size", "32"]
    arguments += ["--buffer-size", "64", "--start-method", "forkserver", "--out", str(tmp_path)]
    done = run_script(EXAMPLES / "training/language.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["kind"] for result in results] == ["balanced", "as collected", "without the text"]
    assert all(result["success"].keys() == {"red", "green", "between", "opposite"} for result in results)
    for picture in ("tasks.png", "episode.png"):
        assert (tmp_path / picture).stat().st_size > 20_000


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_who_acts_is_what_the_step_says(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "training")
    from cloning import ClonedPolicy
    from table_study import EXPERT, POLICY, SOURCE, MixedPolicy

    policy = MixedPolicy(ClonedPolicy(6)).eval()
    policy.beta.fill_(beta)
    seen, wanted = torch.randn(64, 6), torch.full((64, 2), 9.0)
    data = policy(TensorDict({"observation": seen, "expert_action": wanted}, [64]))
    assert (data["action"] == (wanted if beta else policy.policy(seen))).all()
    assert (data[SOURCE] == (EXPERT if beta else POLICY)).all()
    assert "beta" in policy.state_dict()  # so it is sent with the weights


def test_an_expert_reaches_the_goal_and_an_idle_hand_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "training")
    from tabletop import World, successes

    assert successes(World(), None, 200, 0).float().mean() > 0.9
    assert successes(World(), lambda observation: torch.zeros(len(observation), 2), 200, 0).float().mean() < 0.2


def test_the_same_words_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "training")
    from language import LONGEST, words_of

    assert words_of("Go to the RED disc.") == words_of("go to the red disc")
    assert words_of("Go to the red disc.") != words_of("Go to the green disc.")
    assert len(words_of("Go.")) == LONGEST


def test_parameters_outside_of_the_training_range_are_never_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "training")
    from randomised import INSIDE, OUTSIDE, WORLD
    from tabletop import Table

    tables = {world: Table(world, 500, torch.Generator().manual_seed(0)) for world in (WORLD, INSIDE, OUTSIDE)}
    for name in ("mass", "friction", "turn"):
        low, high = getattr(WORLD, name)
        for world in (WORLD, INSIDE):
            drawn = tables[world].parameters[name]
            assert len(drawn.unique()) > 400
            assert ((low <= drawn) & (drawn <= high)).all()
        assert (tables[OUTSIDE].parameters[name] >= high).all()
