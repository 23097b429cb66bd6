"""Engines and pacing made of nonsense; things asked in another place, thread or process."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import threading

import torch
from nonsense import (
    NO_NUMBER,
    NO_POSITIVE_INT,
    PENDULUM,
    Case,
    Place,
    Table,
    Try,
    assert_refused,
    configure,
)
from steps import small
from waiting import PATIENCE

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import (
    ChunkTooLongError,
    ConfigError,
    ConfigFileNotFoundError,
    EngineStateError,
    InvalidArgumentError,
    SchemaMismatchError,
    SharingError,
)
from embodichain_rl.replay.rate_limiter import RateLimiter

TABLE = Table()
refuse, refuse_values = TABLE.refuse, TABLE.refuse_values

# --------------------------------------------------------------------------------------------------------------- pacing

refuse_values("samples_per_insert", lambda _, v: RateLimiter(v), [*NO_NUMBER[:1], math.nan, "1", 0.0, -1.0])
refuse_values("min_size_to_sample", lambda _, v: RateLimiter(1.0, min_size_to_sample=v), [-1, True, 0.5])

# --------------------------------------------------------------------------------------------------------------- engine


for _name in ("buffer_size", "max_episode_steps", "max_generation_attempts", "state_dim"):
    refuse_values(_name, lambda _, v, name=_name: configure(**{name: v}), NO_POSITIVE_INT[:5], ConfigError)
for _name in ("num_workers", "max_worker_restarts", "seed"):
    refuse_values(_name, lambda _, v, name=_name: configure(**{name: v}), [-1, True, 1.5, "2"], ConfigError)
for _name in ("initialization_timeout", "worker_timeout", "shutdown_timeout", "refill_threshold"):
    refuse_values(_name, lambda _, v, name=_name: configure(**{name: v}), [0.0, -1, *NO_NUMBER], ConfigError)
refuse_values("buffer_device", lambda _, v: configure(buffer_device=v), ["cuda:99", "gpu", 3.5], ConfigError)
refuse_values("start_method", lambda _, v: configure(start_method=v), ["thread", 3, True], ConfigError)
refuse_values("state_key", lambda _, v: configure(state_key=v), ["", (), 3, ("a", 1)], ConfigError)
refuse_values("progress_bar", lambda _, v: configure(progress_bar=v), [1, None], ConfigError)
refuse_values("policy", lambda _, v: configure(policy=v), ["demos"], ConfigError)
refuse(
    ConfigError,
    "must be a function",
    lambda _: configure(accept=3),
    lambda _: configure(policy_factory="make"),
    lambda _: configure(gym_config=None, env_factory=3),
)
refuse(
    ConfigError,
    "gym_config, env_factory and producers",
    lambda _: configure(gym_config=None),
    lambda _: configure(env_factory=int),
    lambda _: configure(producers=[[]]),
)
refuse(
    ConfigError,
    "producers must be",
    lambda _: configure(gym_config=None, producers=[]),
    lambda _: configure(gym_config=None, producers=3),
    lambda _: configure(gym_config=None, producers=[3]),
)
refuse(
    ConfigError,
    "gym_config",
    lambda _: configure(gym_config={}),
    lambda _: configure(gym_config=3),
    lambda _: configure(gym_config={"id": ""}),
    lambda _: configure(gym_config={"id": 3}),
    lambda _: configure(gym_config={**PENDULUM, "num_env": 2}),
    lambda _: configure(gym_config={**PENDULUM, "num_envs": 0}),
    lambda _: configure(gym_config={**PENDULUM, "num_envs": True}),
    lambda _: configure(gym_config={**PENDULUM, "kwargs": 3}),
)
refuse(ConfigFileNotFoundError, r"nowhere\.json", lambda p: configure(gym_config=p.folder / "nowhere.json"))
refuse(
    InvalidArgumentError,
    "OnlineDataEngineCfg",
    lambda _: OnlineDataEngine({}),
    lambda _: OnlineDataEngine(None),
    lambda _: OnlineDataEngine(OnlineDataEngineCfg),
)
refuse(
    EngineStateError,
    r"start\(\)",
    lambda p: p.engine.sample_batch(2, chunk_size=4),
    lambda p: p.engine.sample_chunks(2, 4),
    lambda p: next(iter(OnlineDataset(p.engine, 4, 2))),
)


def stopped() -> OnlineDataEngine:
    engine = OnlineDataEngine(configure())
    engine.stop()
    return engine


refuse(
    EngineStateError,
    "stopped|STOPPED",
    lambda _: stopped().sample_batch(2, chunk_size=4),
    lambda _: stopped().sample_chunks(2, 4),
    lambda _: stopped().start(),
    lambda _: next(iter(OnlineDataset(stopped(), 4, 2))),
)
refuse_values("batch_size", lambda p, v: OnlineDataset(p.engine, 4, v), [0, True])

# ------------------------------------------------------------------------------------- other places, threads, processes


def in_thread(attempt: Try) -> Try:
    def run(place: Place) -> None:
        raised: list[BaseException] = []

        def target() -> None:
            try:
                attempt(place)
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join(PATIENCE)
        raise raised[0]

    return run


def in_fork(attempt: Try) -> Try:
    def run(place: Place) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            try:
                attempt(place)
            except Exception as error:
                sender.send(error)
            finally:
                os._exit(0)
        sender.close()
        assert receiver.poll(PATIENCE)
        os.waitpid(child, 0)
        raise receiver.recv()

    return run


refuse(
    EngineStateError,
    "process that made",
    in_fork(lambda p: p.engine.start()),
    in_fork(lambda p: p.engine.update_policy_weights_(torch.nn.Linear(1, 1))),
)
refuse(ChunkTooLongError, "longest of 3", in_fork(lambda p: p.rb.sample_chunks(2, 9)))
refuse(SchemaMismatchError, "observation", in_fork(lambda p: p.rb.extend(small(7, 8).exclude("observation"))))
refuse(ChunkTooLongError, "longest of 3", in_thread(lambda p: p.rb.sample_chunks(2, 9)))
refuse(SchemaMismatchError, "observation", in_thread(lambda p: p.rb.extend(small(7, 8).exclude("observation"))))
refuse(
    SharingError,
    "only while that process is started",
    lambda p: pickle.dumps(p.rb.storage.ledger),
    lambda p: pickle.dumps(RateLimiter(1.0)),
    lambda p: pickle.dumps(p.engine),
    lambda p: copy.deepcopy(p.engine),
)


@TABLE.each
def test_nonsense_is_refused_and_the_buffer_goes_on(place: Place, case: Case) -> None:
    assert_refused(case, place)
