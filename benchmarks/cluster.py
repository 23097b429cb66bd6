"""A buffer that is filled over a Ray cluster: beside one that is filled on this machine, and beside TorchRL's.

The cluster is one of two raylets on this machine, on loopback. The contestants take turns, several times each; each
result is the median of the turns.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --quick

0. The core of the gateway: what writing messages of 1 MiB takes of a processor, without Ray.
1. Inserting: one producer sends ready-made trajectories as fast as it can. ``local``: a process of this machine extends
   the buffer. ``cluster``: an actor sends messages, the gateway writes them. ``RayReplayBuffer``: an actor calls
   ``extend`` of TorchRL's buffer, which is an actor too.
2. Collecting: two workers step Pendulum, or an environment with images, and the learner samples at the same time.
   ``local``: an engine. ``cluster``: the same engine with a ``RayCluster``. ``RayReplayBuffer``: TorchRL's
   ``RayCollector``.
3. What the cluster receives for each byte inserted, when each trajectory is sampled once and 32 times.
4. A learner that samples nothing for a while: what the cluster spills to disk.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _harness import print_table, write_report
from _pixel_env import PIXELS
from _pixel_env import STEPS as IMAGE_STEPS
from _ray_cluster import local_cluster, spilled_mebibytes
from tensordict import TensorDict

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, TrajectoryReplayBuffer
from embodichain_rl.cluster import RayCluster

STEPS = 200
"""Steps of a trajectory of states."""

CALLS = 200
CHUNK = 8
BATCHES = {False: 256, True: 16}
"""Chunks of a sample of states, and of images."""

ENVIRONMENTS = {False: ("Pendulum-v1", STEPS), True: (PIXELS, IMAGE_STEPS)}
"""The environment with states and the one with images, and the steps of their episodes."""

SAMPLES_PER_INSERT = (1.0, 32.0)


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    seconds: float = 6.0
    """Seconds of one turn."""
    rounds: int = 3
    """Turns of each contestant."""
    quick: bool = False
    """One short turn of each: whether everything runs."""
    out: Path | None = None
    """Where the report goes, as JSON."""


def trajectory(images: bool) -> TensorDict:
    steps = IMAGE_STEPS if images else STEPS
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    data = TensorDict(
        {
            "observation": torch.randn(steps, 24),
            "action": torch.randn(steps, 8),
            "next": {"observation": torch.randn(steps, 24), "reward": torch.randn(steps, 1), "done": done},
        },
        [steps],
    )
    if images:
        data["pixels"] = torch.randint(0, 255, (steps, 96, 96, 3), dtype=torch.uint8)
    return data


def buffer_for(images: bool) -> TrajectoryReplayBuffer:
    count = 64 if images else 512
    steps = IMAGE_STEPS if images else STEPS
    buffer = TrajectoryReplayBuffer(max_trajectories=count, max_total_steps=count * steps, chunk_size=CHUNK)
    buffer.storage.allocate(trajectory(images)[:1])
    return buffer


# ---------------------------------------------------------------------------------------------------------- inserting


def _extend_until(stop: Any, buffer: TrajectoryReplayBuffer, images: bool) -> None:
    torch.set_num_threads(1)
    data = trajectory(images)
    while not stop.is_set():
        buffer.extend(data)


def core_of_the_gateway(images: bool) -> dict[str, float]:
    """Return the bytes per second of processor time that messages are written with, and that ``extend`` writes."""
    from embodichain_rl.cluster.messages import MessageBuilder, MessageFormat, payload_bytes, trajectories
    from embodichain_rl.replay.schema import as_array

    buffer, data = buffer_for(images), trajectory(images)
    storage = buffer.storage
    assert storage.schema is not None
    format = MessageFormat(storage.schema, ())
    arrays = [as_array(value) for value in storage.schema.leaves(data)]
    builder = MessageBuilder(format, storage.texts, 1 << 20)
    while builder.nbytes < 1 << 20:
        builder.add([arrays], [], 0, 0.0)
    message = builder.build(0.0)
    started = time.process_time()
    for _ in range(CALLS):
        for received in trajectories(message, format, storage.texts):
            storage.write([received.piece], received.of_trajectory, policy_version=received.policy_version)
    writing = time.process_time() - started
    started = time.process_time()
    for _ in range(CALLS):
        buffer.extend(data)
    extending = time.process_time() - started
    return {
        "messages": CALLS * payload_bytes(message) / writing / 1e6,
        "extend": CALLS * data.bytes() / extending / 1e6,
    }


def insert_locally(images: bool, seconds: float) -> float:
    """Return the bytes per second that a process of this machine inserts."""
    buffer = buffer_for(images)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=_extend_until, args=(stop, buffer, images))
    process.start()
    rate = _rate_of(buffer, seconds)
    stop.set()
    process.join()
    return rate


def _rate_of(buffer: TrajectoryReplayBuffer, seconds: float) -> float:
    """Return the bytes per second that arrive in a buffer, from the first trajectory on."""
    ledger, storage = buffer.storage.ledger, buffer.storage
    while not ledger.stats()["published"]:
        time.sleep(0.01)
    before, started = ledger.steps_written, time.monotonic()
    time.sleep(seconds)
    return (ledger.steps_written - before) * storage.nbytes_per_step / (time.monotonic() - started)


def insert_over_cluster(address: str, images: bool, seconds: float) -> float:
    """Return the bytes per second that a gateway inserts which one actor sends ready-made trajectories."""
    buffer = buffer_for(images)
    context = multiprocessing.get_context("spawn")
    from embodichain_rl.engine.state import EngineChannel

    channel = EngineChannel(1)
    process = context.Process(target=_serve_bulk, args=(address, buffer, channel, images))
    process.start()
    rate = _rate_of(buffer, seconds)
    channel.request_stop()
    process.join()
    return rate


def _serve_bulk(address: str, buffer: TrajectoryReplayBuffer, channel: Any, images: bool) -> None:
    """Run a gateway whose only actor has ready-made trajectories in the place of environments."""
    from _bulk_actor import BulkActor

    from embodichain_rl.cluster.gateway import Gateway, GatewayJob
    from embodichain_rl.cluster.status import ClusterStatus

    receiver, sender = multiprocessing.Pipe()
    job = GatewayJob(
        cluster=RayCluster(address),
        spec=pickle.dumps(trajectory(images).numpy()),
        policy_version=0,
        storage=buffer.storage,
        channel=channel,
        limiter=None,
        status=ClusterStatus(1),
        pipe=receiver,
        shutdown_timeout=5.0,
        patience=60.0,
        start_timeout=120.0,
        mark="",
    )
    sender.send_bytes(pickle.dumps(("start", 0, 0)))
    Gateway(job, BulkActor).run()


class _TorchRLCollecting:
    """TorchRL's buffer on Ray. What it holds is an actor; so is who extends it."""

    def __init__(self, images: bool) -> None:
        from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
        from torchrl.data.replay_buffers.ray_buffer import RayReplayBuffer

        steps = 64 * IMAGE_STEPS if images else 512 * STEPS
        self.buffer = RayReplayBuffer(
            replay_buffer_cls=TensorDictReplayBuffer,
            storage=partial(LazyTensorStorage, steps),
            sampler=partial(SliceSampler, slice_len=CHUNK, end_key=("next", "done"), cache_values=False),
            batch_size=BATCHES[images] * CHUNK,
            remote_config={"num_cpus": 0},
        )


def insert_with_torchrl(address: str, images: bool, seconds: float) -> float:
    """Return the bytes per second that an actor inserts into TorchRL's buffer on Ray."""
    import ray

    ray.init(address=address, logging_level="error", log_to_driver=False)
    try:
        buffer = _TorchRLCollecting(images).buffer
        data = trajectory(images)
        extend = ray.remote(num_cpus=1)(_extend_for)
        ray.get(extend.remote(buffer.client(), data, 0.1))
        count, took = ray.get(extend.remote(buffer.client(), data, seconds))
        return count * data.bytes() / took
    finally:
        ray.shutdown()


def _extend_for(client: Any, data: TensorDict, seconds: float) -> tuple[int, float]:
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        client.extend(data)
        count += 1
    return count, time.monotonic() - started


# --------------------------------------------------------------------------------------------------------- collecting


def collect_with_engine(cluster: RayCluster | None, images: bool, seconds: float) -> dict[str, float]:
    with OnlineDataEngine(_engine_cfg(cluster, images)) as engine:
        started, before = time.monotonic(), engine.stats()
        latencies = _sample_until(started + seconds, partial(engine.sample_batch, BATCHES[images], CHUNK))
        took, after = time.monotonic() - started, engine.stats()
        steps = sum(w["steps"] for w in after["workers"]) - sum(w["steps"] for w in before["workers"])
        return {"steps": steps / took, "sample": float(np.median(latencies))}


def _engine_cfg(
    cluster: RayCluster | None, images: bool, *, samples_per_insert: float | None = None, buffer_size: int = 64
) -> OnlineDataEngineCfg:
    environment, steps = ENVIRONMENTS[images]
    return OnlineDataEngineCfg(
        buffer_size=buffer_size,
        gym_config={"id": environment},
        policy="random",
        max_episode_steps=steps,
        num_workers=2,
        refill_threshold=samples_per_insert,
        progress_bar=False,
        cluster=cluster,
    )


def _sample_until(end: float, sample: Callable[[], Any]) -> list[float]:
    """Sample until a time; return how long each call took, in seconds."""
    latencies = []
    while time.monotonic() < end:
        begin = time.perf_counter()
        sample()
        latencies.append(time.perf_counter() - begin)
        time.sleep(0.002)  # the training step: the workers need the processor too
    return latencies


def payload_per_byte(address: str, images: bool, samples_per_insert: float, seconds: float) -> float:
    """Return the bytes that the gateway receives for each byte that is inserted.

    It is the least of many looks: in between, messages have been received that are not inserted yet.
    """
    cfg = _engine_cfg(RayCluster(address), images, samples_per_insert=samples_per_insert)
    with OnlineDataEngine(cfg) as engine:
        nbytes = ENVIRONMENTS[images][1] * engine.replay_buffer.storage.nbytes_per_step
        shares = []

        def look() -> None:
            engine.sample_batch(BATCHES[images], CHUNK)
            stats = engine.stats()
            shares.append(sum(node["bytes"] for node in stats["nodes"]) / (stats["inserted"] * nbytes))

        _sample_until(time.monotonic() + seconds, look)
        return min(shares)


def collect_with_torchrl(address: str, images: bool, seconds: float) -> dict[str, float]:
    import ray
    from torchrl.collectors.distributed import RayCollector
    from torchrl.envs import GymEnv, StepCounter, TransformedEnv
    from torchrl.modules import RandomPolicy

    ray.init(address=address, logging_level="error", log_to_driver=False)
    try:
        buffer = _TorchRLCollecting(images).buffer
        environment, episode = ENVIRONMENTS[images]

        def make_env() -> Any:
            return TransformedEnv(GymEnv(environment), StepCounter(episode))

        collector = RayCollector(
            [make_env] * 2,
            RandomPolicy(make_env().full_action_spec),
            frames_per_batch=episode,
            total_frames=10**9,
            replay_buffer=buffer,
            trajs_per_batch=1,
            remote_configs={"num_cpus": 1, "num_gpus": 0},
            num_collectors=2,
        )
        collector.start()
        while buffer.write_count < 10 * episode:
            time.sleep(0.05)
        started, before = time.monotonic(), buffer.write_count
        latencies = _sample_until(started + seconds, buffer.sample)
        steps = (buffer.write_count - before) / (time.monotonic() - started)
        collector.shutdown()
        return {"steps": steps, "sample": float(np.median(latencies))}
    finally:
        ray.shutdown()


def spilled_by_a_slow_learner(address: str, seconds: float) -> float:
    """Return the MiB that a cluster spills whose workers are far ahead of a learner that samples nothing."""
    before = spilled_mebibytes(address)
    cluster = RayCluster(address, message_bytes=8 << 20)
    cfg = _engine_cfg(cluster, False, samples_per_insert=1.0, buffer_size=16)
    with OnlineDataEngine(cfg):
        time.sleep(seconds)
        return spilled_mebibytes(address) - before


# ------------------------------------------------------------------------------------------------------------- report


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            results[name].append(measure())
    return results


def main() -> None:
    cfg = tyro.cli(Config)
    seconds, rounds = (1.0, 1) if cfg.quick else (cfg.seconds, cfg.rounds)
    threading.excepthook = lambda arguments: None  # TorchRL's collection thread, which its shutdown ends
    report = []
    torch.set_num_threads(1)
    for images in (False, True):
        core = core_of_the_gateway(images)
        report.append({"kind": "core", "images": images, "MB/s": core})
        print(
            f"A core writes {core['messages']:,.0f} MB/s of {'images' if images else 'states'} from messages, and "
            f"{core['extend']:,.0f} MB/s by extend"
        )
    with local_cluster() as cluster:
        address = cluster.address
        for images in (False, True):
            rates = in_turns(
                {
                    "local": partial(insert_locally, images, seconds),
                    "cluster": partial(insert_over_cluster, address, images, seconds),
                    "RayReplayBuffer": partial(insert_with_torchrl, address, images, seconds),
                },
                rounds,
            )
            medians = {name: float(np.median(values)) / 1e6 for name, values in rates.items()}
            report.append({"kind": "inserting", "images": images, "MB/s": medians})
            print_table(
                f"Inserting {'images' if images else 'states'}, one producer",
                ("contestant", "MB/s", "cluster's share"),
                [[name, f"{rate:,.1f}", f"{medians['cluster'] / rate:.2f}x"] for name, rate in medians.items()],
            )
        for images in (False, True):
            found = in_turns(
                {
                    "local": partial(collect_with_engine, None, images, seconds),
                    "cluster": partial(collect_with_engine, RayCluster(address), images, seconds),
                    "RayReplayBuffer": partial(collect_with_torchrl, address, images, seconds),
                },
                rounds,
            )
            rows = []
            for name, turns in found.items():
                steps, sample = (float(np.median([turn[key] for turn in turns])) for key in ("steps", "sample"))
                rows.append([name, f"{steps:,.0f}", f"{1e6 * sample:,.0f} us", f"{BATCHES[images] / sample:,.0f}"])
                report.append(
                    {"kind": "collecting", "images": images, "contestant": name, "steps/s": steps, "sample": sample}
                )
            print_table(
                f"Collecting {'images' if images else 'states'} with two workers; a sample is {BATCHES[images]} "
                f"chunks of {CHUNK} steps",
                ("contestant", "steps/s", "a sample", "chunks/s"),
                rows,
            )
        rows = []
        for images in (False, True):
            kind = "images" if images else "states"
            shares = [payload_per_byte(address, images, count, seconds) for count in SAMPLES_PER_INSERT]
            rows.append([kind, *(f"{share:.3f}" for share in shares)])
            report.append({"kind": "payload", "images": images, "bytes per byte": shares})
        print_table(
            "Payload bytes received for each byte inserted",
            ("", *(f"{count:g} sample(s) per insert" for count in SAMPLES_PER_INSERT)),
            rows,
        )
        spilled = spilled_by_a_slow_learner(address, seconds)
        print(f"\nSpilled to disk for a learner that samples nothing: {spilled:.0f} MiB")
        report.append({"kind": "slow learner", "spilled MiB": spilled})
    write_report(cfg.out, report)


if __name__ == "__main__":
    main()
