"""What users do to stop a training with an engine, and to go on: save it and load it, or keep its buffer in a file."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from waiting import PATIENCE, wait_until

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset, RateLimiter, TrajectoryReplayBuffer
from embodichain_rl.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    InvalidArgumentError,
    SchemaMismatchError,
    StateMismatchError,
)
from embodichain_rl.replay.ledger.invariants import check_ledger


def cfg_of(**settings: Any) -> OnlineDataEngineCfg:
    return OnlineDataEngineCfg(
        **{
            "buffer_size": 4,
            "max_episode_steps": 6,
            "gym_config": {"id": "Pendulum-v1", "max_episode_steps": 6},
            "num_workers": 0,
            "start_method": "forkserver",
            "seed": 3,
            "progress_bar": False,
            "refill_policy": "manual",
            "initialization_timeout": PATIENCE,
            "worker_timeout": PATIENCE,
            "shutdown_timeout": PATIENCE,
            **settings,
        }
    )


def module(features: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(features, 1)


def everything(engine: OnlineDataEngine) -> dict[int, TensorDict]:
    """Return the trajectories by their ids."""
    storage = engine.replay_buffer.storage
    return {number: storage.trajectory(number) for number in storage.ledger.live().all().tolist()}


def same(some: dict[int, TensorDict], others: dict[int, TensorDict]) -> bool:
    return some.keys() == others.keys() and all((some[number] == others[number]).all() for number in some)


def refilled(engine: OnlineDataEngine, n: int) -> dict[int, TensorDict]:
    engine.wait_for_generation(engine.request_refill(n), timeout=PATIENCE)
    return everything(engine)


def test_a_training_is_stopped_and_goes_on(tmp_path: Path) -> None:
    path, policy = tmp_path / "checkpoint", module()
    with OnlineDataEngine(cfg_of(policy=policy)) as engine:
        first = everything(engine)
        with torch.no_grad():
            policy.weight += 1.0
        engine.update_policy_weights_(policy)
        before = refilled(engine, 2)
        dataset = OnlineDataset(engine, chunk_size=3, batch_size=4, seed=5)
        batches = iter(dataset)
        next(batches)
        engine.save(path, dataset=dataset, policy=policy, step=7, best=torch.tensor([0.5]))
        assert engine.state.name == "READY"
        following = next(batches)
    assert before.keys() == {2, 3, 4, 5}

    with pytest.raises(ConfigError, match="without policy"):
        OnlineDataEngine.load(path)
    continued = []
    for cfg in (cfg_of(policy=module()), None):
        changes = {} if cfg is not None else {"policy": module()}
        engine = OnlineDataEngine.load(path, cfg, **changes)
        assert same(everything(engine), before)
        assert engine.saved_states["step"] == 7
        assert engine.saved_states["best"].tolist() == [0.5]
        model = module()
        model.load_state_dict(engine.saved_states["policy"])
        assert torch.equal(model.weight, policy.weight)
        with engine:
            assert same(everything(engine), before)  # nothing is missing
            assert engine.stats()["policy_version"] == 1
            wait_until(lambda e=engine: e.stats()["workers"][0]["policy_version"] == 1, "the weights in the worker")
            dataset = OnlineDataset(engine, chunk_size=3, batch_size=4, seed=5)
            dataset.load_state_dict(engine.saved_states["dataset"])
            assert torch.equal(next(iter(dataset))["index"], following["index"])
            assert engine.generation == 2
            continued.append(refilled(engine, 3))
            # The policy of the workers is the one that was saved.
            newest = continued[-1][8]
            action = policy(newest["observation"]).detach()
            assert torch.allclose(newest["action"], action, atol=1e-5)
            engine.save(tmp_path / f"again {len(continued)}")
    assert continued[0].keys() == {5, 6, 7, 8}
    assert same(*continued)  # also what came after the checkpoint
    starts = {number: data["observation"][0] for part in (first, before, continued[0]) for number, data in part.items()}
    assert len(torch.stack([*starts.values()]).unique(dim=0)) == 9  # no episode twice

    third = OnlineDataEngine.load(tmp_path / "again 2", policy=module())
    with third:
        assert not (refilled(third, 1)[9]["observation"][0] == torch.stack([*starts.values()])).all(-1).any()


def test_the_counts_of_the_pacing_go_on(tmp_path: Path) -> None:
    cfg = cfg_of(refill_policy="sample_threshold", refill_threshold=8.0)
    with OnlineDataEngine(cfg) as engine:
        for _ in range(20):
            engine.sample_batch(4, 2)
        wait_until(lambda: engine.stats()["rate_limiter"]["waiting_producers"] > 0, "a worker that waits")
        engine.save(tmp_path)
        counts = engine.rate_limiter.state_dict()
    assert counts["paced_samples"] == 80
    loaded = OnlineDataEngine.load(tmp_path)
    assert {**loaded.rate_limiter.state_dict(), "paused": 0.0} == counts
    with loaded:
        assert loaded.stats()["rate_limiter"]["samples"] == 80
        loaded.sample_batch(4, 2)
        assert loaded.stats()["rate_limiter"]["samples"] == 84
    faster = OnlineDataEngine.load(tmp_path, refill_threshold=2.0)
    assert faster.stats()["rate_limiter"]["samples_per_insert"] == 2.0


def test_a_limiter_goes_on() -> None:
    first, second = RateLimiter(4.0, min_size_to_sample=2), RateLimiter(4.0, min_size_to_sample=2)
    second.count_insert(9)
    first.count_insert(3)
    first.count_sample(5)
    second.load_state_dict(first.state_dict())
    assert second.stats() == first.stats()
    assert second.stats()["diff"] == 7.0
    for bad in ({}, {**first.state_dict(), "diff": "x"}, {**first.state_dict(), "diff": float("nan")}, None):
        with pytest.raises(CheckpointError):
            second.load_state_dict(bad)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with OnlineDataEngine(cfg_of(policy=module())) as engine:
        with pytest.raises(InvalidArgumentError, match="can't be stored"):
            engine.save(path, function=print)
        engine.save(path)
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.raises(CheckpointWriteError):
            engine.save(blocked)
    for change in ({"buffer_size": 5}, {"seed": 4}, {"max_episode_steps": 7}, {"compact": True}):
        with pytest.raises(StateMismatchError, match=next(iter(change))):
            OnlineDataEngine.load(path, cfg_of(policy=module(), **change))
    with pytest.raises(StateMismatchError, match="refill_policy"):
        OnlineDataEngine.load(path, policy=module(), refill_policy="sample_threshold")
    with pytest.raises(StateMismatchError, match="has none"):
        OnlineDataEngine.load(path, cfg_of()).start()
    with pytest.raises(StateMismatchError, match="not the one that was saved"):
        OnlineDataEngine.load(path, policy=torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Tanh())).start()
    with pytest.raises(StateMismatchError, match="Pendulum"):
        OnlineDataEngine.load(path, cfg_of(policy=module(4), gym_config={"id": "CartPole-v1"}))
    with pytest.raises(InvalidArgumentError, match="OnlineDataEngineCfg"):
        OnlineDataEngine.load(path, {"buffer_size": 4})  # type: ignore[arg-type]

    for nothing in (tmp_path / "nowhere", path / "buffer", tmp_path):
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            OnlineDataEngine.load(nothing, policy=module())
    noted = json.loads((path / "engine.json").read_text())
    for name, damage in (("folder", "../other"), ("format", 99), ("engine", None)):
        (path / "engine.json").write_text(json.dumps({**noted, name: damage}))
        with pytest.raises(CheckpointError):
            OnlineDataEngine.load(path, policy=module())
    (path / "engine.json").write_text(json.dumps(noted))
    states = path / noted["folder"] / "states.pt"
    states.write_bytes(states.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        OnlineDataEngine.load(path, policy=module())


def test_an_environment_with_other_keys_is_refused(tmp_path: Path) -> None:
    engine = OnlineDataEngine(cfg_of())
    step = TensorDict({"observation": torch.zeros(2, 5), "next": {"done": torch.tensor([[False], [True]])}}, [2])
    engine.replay_buffer.extend(step)
    engine.save(tmp_path)
    with pytest.raises(SchemaMismatchError):
        OnlineDataEngine.load(tmp_path).start()


# ------------------------------------------------------------------------------------------------- a buffer in a file


def killed_while_it_fills(cfg: OnlineDataEngineCfg, at: int) -> None:
    """Start an engine in a process; SIGKILL it, with its worker, when it has so many trajectories."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(cfg,))
    process.start()

    def found() -> bool:
        assert process.exitcode is None, "the engine ended"
        try:
            return len(TrajectoryReplayBuffer.open(cfg.buffer_path, mode="r")) >= at  # type: ignore[arg-type]
        except (OSError, ValueError):
            return False

    wait_until(found, "the first trajectories")
    process.kill()
    process.join()


def _run(cfg: OnlineDataEngineCfg) -> None:
    OnlineDataEngine(cfg).start()


def test_everything_is_killed_while_the_buffer_fills(tmp_path: Path) -> None:
    path = tmp_path / "buffer"
    slow = {"id": f"{__name__}:SlowPendulum-v0", "max_episode_steps": 6}
    cfg = cfg_of(buffer_size=12, buffer_path=path, gym_config=slow)
    killed_while_it_fills(cfg, at=3)
    found = TrajectoryReplayBuffer.open(path)
    check_ledger(found.storage.ledger)
    kept = {number: found.storage.trajectory(number) for number in found.storage.ledger.live().all().tolist()}
    del found
    assert 3 <= len(kept) < 12
    assert [*kept] == [*range(len(kept))]

    with OnlineDataEngine(cfg_of(buffer_size=12, buffer_path=path)) as engine:
        filled = everything(engine)
        assert [*filled] == [*range(12)]  # what was missing, and no more
        assert same({number: filled[number] for number in kept}, kept)
        starts = torch.stack([data["observation"][0] for data in filled.values()])
        assert len(starts.unique(dim=0)) == 12  # no episode twice, though the seed is the same
        engine.save(tmp_path / "checkpoint")
        after = refilled(engine, 2)
        assert [*after] == [*range(2, 14)]
    # The file has all that came after the checkpoint.
    engine = OnlineDataEngine.load(tmp_path / "checkpoint")
    assert same(everything(engine), after)
    del engine
    # A new file gets what the checkpoint has.
    engine = OnlineDataEngine.load(tmp_path / "checkpoint", buffer_path=tmp_path / "new")
    assert same(everything(engine), filled)
    other = OnlineDataEngine(cfg_of(buffer_size=12, buffer_path=tmp_path / "other"))
    other.replay_buffer.extend(filled[0].exclude("index", "trajectory"))
    del other
    with pytest.raises(CheckpointError, match="not the one that was saved"):
        OnlineDataEngine.load(tmp_path / "checkpoint", buffer_path=tmp_path / "other")


def slow_pendulum(**kwargs: Any) -> Any:
    import gymnasium

    class Slow(gymnasium.Wrapper):
        def step(self, action: Any) -> Any:
            time.sleep(0.03)
            return self.env.step(action)

    return Slow(gymnasium.make("Pendulum-v1", **kwargs).unwrapped)


def _register() -> None:
    import gymnasium

    gymnasium.register("SlowPendulum-v0", entry_point=slow_pendulum)


_register()
