"""A simulator on the GPU, Brax, whose steps are stored, drawn and learned from there: they never leave the device.

    pip install brax "jax[cuda13]"
    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/gpu_simulator.py

Brax steps thousands of environments in JAX. Their steps go through DLPack, without a copy, to a buffer on the same
device. There are two parts:

* throughput: blocks `[B, T]` of random actions: simulated only; stored too; and stored while batches are drawn;
* learning: TD3 (Fujimoto et al., 2018, https://arxiv.org/abs/1802.09477) of TorchRL learns from the buffer, one batch
  for each step of all environments. The mean length and return of the stored episodes say what it has learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brax.envs
import jax
import jax.numpy as jnp
import torch
import tyro
from _harness import print_table, write_report
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SoftUpdate, TD3Loss

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage


@dataclass(frozen=True)
class Config:
    """Store and learn from the steps of Brax."""

    env: str = "ant"
    """The environment whose throughput is measured."""
    environments: int = 4096
    """How many are stepped at once."""
    learn_env: str = "inverted_pendulum"
    """The environment that is learned."""
    learn_environments: int = 256
    """How many are stepped at once while learning."""
    episode: int = 200
    """Steps after which an episode is truncated."""
    steps: int = 32
    """Steps of a block."""
    seconds: float = 10.0
    """Duration of each contestant of the first part."""
    learn_seconds: float = 60.0
    """Duration of the second part."""
    device: str = "cuda"
    """Where everything is; "cpu" to try the script."""
    out: Path | None = None
    """Path of the JSON file for the results."""


class Brax:
    """Environments of Brax that are stepped together and reset one by one, with the true last observations."""

    def __init__(self, name: str, count: int, episode: int) -> None:
        env = brax.envs.get_environment(name, backend="spring")
        self.count, self.actions, self.observations = count, env.action_size, env.observation_size
        self._reset = jax.jit(jax.vmap(env.reset))
        self._key = jax.random.key(0)
        first = self._reset(jax.random.split(self._key, count))
        self.state = first, jnp.arange(count) % episode  # the first episodes end one after the other

        def step(state: Any, action: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            now, age = state
            following = jax.vmap(env.step)(now, action)
            terminated = following.done > 0.5
            truncated = (age + 1 >= episode) & ~terminated
            over = terminated | truncated

            def restart(new: jax.Array, old: jax.Array) -> jax.Array:
                return (
                    jnp.where(over.reshape(-1, *[1] * (old.ndim - 1)), new, old) if old.shape[:1] == over.shape else old
                )

            after = jax.tree.map(restart, first, following), jnp.where(over, 0, age + 1)
            entries = {
                "observation": now.obs,
                "action": action,
                "next_observation": following.obs,
                "reward": following.reward[:, None],
                "terminated": terminated[:, None],
                "truncated": truncated[:, None],
            }
            return after, entries

        self.step = jax.jit(step)

        def block(state: Any, key: jax.Array, steps: int) -> tuple[Any, dict[str, jax.Array]]:
            def one(state: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
                return step(state, jax.random.uniform(key, (count, env.action_size), minval=-1.0, maxval=1.0))

            state, entries = jax.lax.scan(one, state, jax.random.split(key, steps))
            return state, {name: jnp.swapaxes(entry, 0, 1) for name, entry in entries.items()}

        self._block = jax.jit(block, static_argnums=2)

    def blocks(self, steps: int) -> Iterator[TensorDict]:
        """Yield blocks ``[B, T]`` of random actions."""
        while True:
            self._key, key = jax.random.split(self._key)
            self.state, entries = self._block(self.state, key, steps)
            yield as_steps({name: torch.from_dlpack(entry) for name, entry in entries.items()})


def as_steps(entries: dict[str, torch.Tensor]) -> TensorDict:
    """Return the entries of steps as TorchRL names them."""
    done = entries["terminated"] | entries["truncated"]
    after = {
        "observation": entries["next_observation"],
        "reward": entries["reward"],
        "terminated": entries["terminated"],
        "truncated": entries["truncated"],
        "done": done,
    }
    return TensorDict(
        {"observation": entries["observation"], "action": entries["action"], "next": after}, done.shape[:-1]
    )


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def make_buffer(environments: int, episode: int, device: str, chunk: int, batch_size: int) -> TrajectoryReplayBuffer:
    storage = TrajectoryStorage(4 * environments, 2 * environments * episode, device=device)
    return TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(chunk), batch_size=batch_size)


def measure_throughput(config: Config) -> list[dict[str, Any]]:
    simulator = Brax(config.env, config.environments, config.episode)
    rb = make_buffer(config.environments, config.episode, config.device, chunk=16, batch_size=1024)
    blocks = simulator.blocks(config.steps)
    drawn = 0

    def store_and_draw(block: TensorDict) -> None:
        nonlocal drawn
        rb.extend(block)
        for _ in range(8):
            drawn += rb.sample().numel()

    contestants: dict[str, Callable[[TensorDict], object]] = {
        "simulated": lambda block: None,
        "and stored": rb.extend,
        "and drawn": store_and_draw,
    }
    rows, results = [], []
    for name, consume in contestants.items():
        # Until every environment has ended an episode, and all is compiled.
        for _ in range(config.episode // config.steps + 2 if consume == rb.extend else 1):
            consume(next(blocks))
        synchronize(config.device)
        drawn, count, begin = 0, 0, time.perf_counter()
        while time.perf_counter() - begin < config.seconds:
            consume(next(blocks))
            synchronize(config.device)
            count += config.steps * config.environments
        seconds = time.perf_counter() - begin
        rows.append((name, f"{count / seconds:,.0f}", f"{drawn / seconds:,.0f}"))
        results.append(
            {"part": "throughput", "contestant": name, "steps_per_second": count / seconds, "drawn": drawn / seconds}
        )
    print_table(
        f"{config.environments:,} environments {config.env!r} of Brax; {len(rb):,} trajectories in the buffer",
        ("", "steps/s", "steps/s drawn"),
        rows,
    )
    return results


def measure_learning(config: Config) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    simulator = Brax(config.learn_env, config.learn_environments, config.episode)
    rb = make_buffer(config.learn_environments, config.episode, config.device, chunk=1, batch_size=1024)
    device = rb.storage.device
    sizes = {"num_cells": [256, 256], "device": device}
    net = MLP(in_features=simulator.observations, out_features=simulator.actions, **sizes)
    actor = torch.nn.Sequential(net, torch.nn.Tanh())
    policy = TensorDictModule(actor, ["observation"], ["action"])
    critic = ValueOperator(
        MLP(in_features=simulator.observations + simulator.actions, out_features=1, **sizes), ["observation", "action"]
    )
    loss = TD3Loss(policy, critic, bounds=(-1.0, 1.0), num_qvalue_nets=2)
    loss.make_value_estimator(gamma=0.99)
    target = SoftUpdate(loss, tau=0.005)
    optimizers = [
        torch.optim.Adam(loss.actor_network_params.flatten_keys().values(), lr=3e-4),
        torch.optim.Adam(loss.qvalue_network_params.flatten_keys().values(), lr=1e-3),
    ]
    simulator.step(simulator.state, jnp.zeros((simulator.count, simulator.actions)))  # compiles it
    rows, results = [], []
    updates = steps = 0
    begin = reported = time.perf_counter()
    pending: list[dict[str, torch.Tensor]] = []
    observation = torch.from_dlpack(simulator.state[0].obs).clone()
    while time.perf_counter() - begin < config.learn_seconds:
        with torch.no_grad():
            action = (actor(observation) + 0.2 * torch.randn(len(observation), simulator.actions, device=device)).clamp(
                -1, 1
            )
        simulator.state, entries = simulator.step(simulator.state, jnp.from_dlpack(action.contiguous()))
        pending.append({name: torch.from_dlpack(entry).clone() for name, entry in entries.items()})
        observation = torch.from_dlpack(simulator.state[0].obs).clone()
        steps += len(observation)
        if len(pending) == 8:
            rb.extend(torch.stack([as_steps(entry) for entry in pending], dim=1))
            pending.clear()
        if len(rb) < config.learn_environments // 4:
            continue
        batch = rb.sample()[:, 0]
        losses = loss(batch)
        for number, (optimizer, name) in enumerate(zip(optimizers, ("loss_actor", "loss_qvalue"), strict=True)):
            if number == 0 and updates % 2:
                continue  # the policy is updated half as often
            optimizer.zero_grad()
            losses[name].backward()
            optimizer.step()
        target.step()
        updates += 1
        if time.perf_counter() - reported > config.learn_seconds / 8:
            reported = time.perf_counter()
            stats = rb.stats()
            row = (reported - begin, steps, updates, stats["length_mean"], stats["return_mean"])
            rows.append((f"{row[0]:.0f}", f"{steps:,}", f"{updates:,}", f"{row[3]:.1f}", f"{row[4]:.1f}"))
            names = ("seconds", "steps", "updates", "length", "return")
            results.append({"part": "learning", **dict(zip(names, map(float, row), strict=True))})
    print_table(
        f"TD3 on {config.learn_environments} environments {config.learn_env!r}: the stored episodes",
        ("s", "steps", "updates", "mean length", "mean return"),
        rows,
    )
    return results


def main(config: Config) -> None:
    print(jax.devices(), torch.cuda.get_device_name() if config.device != "cpu" else "")
    write_report(config.out, measure_throughput(config) + measure_learning(config))


if __name__ == "__main__":
    main(tyro.cli(Config))
