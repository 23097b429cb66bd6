"""A recurrent DQN balances CartPole without seeing velocities, trained on chunks of episodes while they are collected.

    worker 0: CartPole, GRU ── rb.extend(episode) ──┐
                                                    ├── shared memory ── rb.sample() ── DQNLoss ── this process
    worker 1: CartPole, GRU ── rb.extend(episode) ──┘
         ^────────────────── update_policy_weights_() ──────────────────────────────────────────────────┘

One observation does not contain the velocities, so the network needs a memory and is trained on chunks of consecutive
steps. Everything except the buffer is TorchRL's. With a `SliceSampler`, these lines differ:

    -rb = TensorDictReplayBuffer(
    -    storage=LazyTensorStorage(STEPS), sampler=SliceSampler(slice_len=L, end_key=("next", "done")),
    -    batch_size=B * L, shared=True,
    +rb = TrajectoryReplayBuffer(
    +    max_trajectories=EPISODES, max_total_steps=STEPS,
    +    sampler=ChunkSampler(L, pad="both", weights="steps"), batch_size=B,
     )
     collector = MultiAsyncCollector([make_env] * 2, policy, ..., replay_buffer=rb, trajs_per_batch=1)
     collector.start()
     while True:
    -    batch = rb.sample().reshape(B, L)
    +    batch = rb.sample()
         errors = dqn_loss(batch)["loss"][:, burn_in:]
    -    loss = errors.mean()
    +    loss = masked_mean(errors, batch["collector", "mask"][:, burn_in:])

The benefits: every step of the buffer is sampled equally often, including the first and last steps of an episode and
episodes with fewer than `L` steps. The few long episodes at the start are not outweighed by the many short ones.
Workers and learner do not wait for each other's lock.

    python examples/rl/recurrent_dqn.py
    python examples/rl/recurrent_dqn.py --seed 1 --seconds 900
    python examples/rl/recurrent_dqn.py --help

It is solved when 100 greedy episodes last 475 of their 500 steps on average, which is Gymnasium's threshold.
"""

from __future__ import annotations

import signal

if __name__ == "__mp_main__":  # a worker, which imports this file
    # Ctrl-C reaches every process of a terminal. The main process shuts its workers down, so it is ignored here, before
    # the imports that take seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gymnasium
import matplotlib

matplotlib.use("agg")  # renders without a window, even if there is a screen

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import MultiAsyncCollector
from torchrl.envs import Compose, GymWrapper, InitTracker, RewardScaling, TransformedEnv
from torchrl.modules import EGreedyModule, GRUModule, QValueModule, set_recurrent_mode
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators
from tqdm import tqdm

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import masked_mean

EPISODE_STEPS, ACTIONS, SOLVED = 500, 2, 475.0  # of CartPole-v1
ENVIRONMENT = "CartPole-v1"
SEEN = [0, 2]
"""Indices of the observed values: the position of the cart and the angle of the pole, without their velocities."""
SCALE = np.array([4.0, 20.0], np.float32)
"""Scale of both values. The changes between two steps must be large enough, since the network derives velocities from
them."""
REWARD_SCALE = 0.1
"""Scale of the reward. With a reward of 1 for each of 500 steps, the values would be far from the initial outputs of
the network."""


@dataclass(frozen=True)
class Config:
    """Train a recurrent DQN on CartPole with hidden velocities, while workers collect."""

    seconds: float = 600.0
    """Maximum duration from the first update on."""
    seed: int = 0
    """Seed of the workers, the sampling, the network and the evaluation."""
    num_workers: int = 2
    """Number of processes that step environments."""
    frames_per_batch: int = 100
    """Steps after which a worker loads the weights that it has received."""
    max_trajectories: int = 2000
    """Maximum number of episodes in the buffer. The newest ones are kept."""
    max_total_steps: int = 20_000
    """Maximum number of steps in the buffer, of all episodes. The recurrent states and the returns of much older
    networks say little about the current network."""
    chunk_size: int = 16
    """Steps of a chunk."""
    burn_in: int = 4
    """Number of steps at the start of a chunk that only warm up the recurrent state."""
    batch_size: int = 64
    """Chunks per update."""
    hidden_size: int = 64
    """Size of the recurrent state."""
    learning_rate: float = 1e-3
    learning_rate_decay: float = 0.999
    """Decay of the learning rate at each update, so that a policy that balances is less easily lost again."""
    gamma: float = 0.99
    lmbda: float = 0.9
    """Lambda of the TD(lambda) returns along a chunk, which propagate a fall back over many steps at once."""
    target_update: float = 0.01
    """Interpolation factor of the target network towards the trained network at each update."""
    exploration_steps: int = 10_000
    """Number of steps until the exploration rate reaches its minimum."""
    update_weights_every: int = 20
    """Updates between two updates of the workers' weights."""
    evaluate_every: int = 250
    """Updates between two evaluations."""
    evaluation_episodes: int = 100
    out: Path = Path("outputs/recurrent_dqn")
    """Folder for the figure."""


def seen(observation: np.ndarray) -> np.ndarray:
    return observation[..., SEEN] * SCALE


def make_env(config: Config) -> TransformedEnv:
    box = gymnasium.spaces.Box(-np.inf, np.inf, [len(SEEN)])
    env = GymWrapper(gymnasium.wrappers.TransformObservation(gymnasium.make(ENVIRONMENT), seen, box))
    # They mark the starts of episodes, and carry the recurrent state from step to step.
    size = config.hidden_size
    memory = make_memory(nn.GRU(size, size, batch_first=True), ("next", "memory")).make_tensordict_primer()
    return TransformedEnv(env, Compose(InitTracker(), memory, RewardScaling(0.0, REWARD_SCALE)))


def make_memory(gru: nn.GRU, written_to: NestedKey) -> GRUModule:
    return GRUModule(gru=gru, in_keys=["features", "memory"], out_keys=["features", written_to])


def make_networks(config: Config) -> tuple[TensorDictSequential, TensorDictSequential]:
    """Make the networks: from observation and recurrent state to the values of both actions and the greedy action.

    Returns the network that acts and the one that is trained, which share their weights. Over a whole chunk, a
    GRUModule writes zeros for all recurrent states but the last. So the trained network writes its states to another
    key: the values of the next observations must start from the states that the worker had, as those of the
    observations do.
    """
    size = config.hidden_size
    features, values = nn.Sequential(nn.Linear(len(SEEN), size), nn.ReLU()), nn.Linear(size, ACTIONS)
    gru = nn.GRU(size, size, batch_first=True)
    acting, trained = (
        TensorDictSequential(
            TensorDictModule(features, in_keys=["observation"], out_keys=["features"]),
            make_memory(gru, written_to),
            TensorDictModule(values, in_keys=["features"], out_keys=["action_value"]),
            QValueModule(action_space="one-hot"),
        )
        for written_to in (("next", "memory"), "last_memory")
    )
    return acting, trained


def make_buffer(config: Config) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        max_trajectories=config.max_trajectories,
        max_total_steps=config.max_total_steps,
        sampler=ChunkSampler(config.chunk_size, pad="both", weights="steps"),
        batch_size=config.batch_size,
    )


@contextmanager
def collecting(
    config: Config, policy: TensorDictSequential, rb: TrajectoryReplayBuffer
) -> Iterator[MultiAsyncCollector]:
    """Run workers that act with the policy and write whole episodes. The block starts when there is one."""
    collector = MultiAsyncCollector(
        [partial(make_env, config)] * config.num_workers,
        policy,
        frames_per_batch=config.frames_per_batch,
        total_frames=-1,
        replay_buffer=rb,
        trajs_per_batch=1,
    )
    try:
        collector.set_seed(config.seed)
        collector.start()
        while not len(rb):
            exit_if_a_worker_died(collector)
            time.sleep(0.01)
        yield collector
    finally:
        collector.shutdown()


def exit_if_a_worker_died(collector: MultiAsyncCollector) -> None:
    """Check for dead workers: TorchRL does not report the death of a worker that was started with start()."""
    if any(worker.exitcode is not None for worker in collector.procs):
        raise SystemExit("A worker has ended; if it raised, its traceback is printed above.")


class Learner:
    """Double Q-learning on chunks, whose first steps only warm up the recurrent state."""

    def __init__(self, config: Config, network: TensorDictSequential) -> None:
        self._loss = DQNLoss(
            network,
            action_space="one-hot",
            loss_function="smooth_l1",
            delay_value=True,
            double_dqn=True,
            reduction="none",
        )
        self._loss.make_value_estimator(ValueEstimators.TDLambda, gamma=config.gamma, lmbda=config.lmbda)
        self._target = SoftUpdate(self._loss, tau=config.target_update)
        self._optimizer = torch.optim.Adam(self._loss.parameters(), lr=config.learning_rate)
        self._schedule = torch.optim.lr_scheduler.ExponentialLR(self._optimizer, config.learning_rate_decay)
        self._burn_in = config.burn_in

    def update(self, batch: TensorDictBase) -> float:
        with set_recurrent_mode("recurrent"):
            errors = self._loss(batch)["loss"]
        # Steps before the start and after the end of an episode are padding.
        loss = masked_mean(errors[:, self._burn_in :], batch["collector", "mask"][:, self._burn_in :])
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._loss.parameters(), 10.0)
        self._optimizer.step()
        self._schedule.step()
        self._target.step()
        return loss.item()

    def steady(self, network: TensorDictSequential) -> AbstractContextManager[object]:
        """Use the target weights in the network within the block: the actions change less from update to update."""
        return self._loss.target_value_network_params.to_module(network)


@torch.no_grad()
def evaluate(network: TensorDictSequential, config: Config, seed: int) -> float:
    """Return the average length of its episodes, which are run as one batch, without exploration."""
    count = config.evaluation_episodes
    envs = gymnasium.make_vec(ENVIRONMENT, count)
    observation, _ = envs.reset(seed=seed)
    state = TensorDict(
        {"memory": torch.zeros(count, 1, config.hidden_size), "is_init": torch.ones(count, 1).bool()}, [count]
    )
    going_on, lengths = np.ones(count, bool), np.zeros(count)
    while going_on.any():
        state["observation"] = torch.from_numpy(seen(observation))
        actions = network(state)["action"].argmax(-1).numpy()
        observation, _, terminated, truncated, _ = envs.step(actions)
        lengths += going_on
        going_on &= ~(terminated | truncated)
        state = TensorDict({"memory": state["next", "memory"], "is_init": torch.zeros(count, 1).bool()}, [count])
    return float(lengths.mean())


@dataclass
class History:
    """Plot the results of the evaluations over the updates."""

    seconds: list[float] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    @property
    def solved(self) -> bool:
        return bool(self.lengths) and self.lengths[-1] >= SOLVED

    def __str__(self) -> str:
        if not self.lengths:
            return "no evaluation yet"
        return (
            f"{self.lengths[-1]:.0f} of {EPISODE_STEPS} steps after {self.seconds[-1]:.0f} s, "
            f"{self.updates[-1]:,} updates and {self.steps[-1]:,} steps of the workers"
        )


def train(config: Config, history: History) -> None:
    """Train until it is solved or the time is up."""
    network, trained = make_networks(config)
    learner = Learner(config, trained)
    exploration = EGreedyModule(
        make_env(config).action_spec, eps_end=0.05, annealing_num_steps=config.exploration_steps
    )
    rb = make_buffer(config)
    with collecting(config, TensorDictSequential(network, exploration), rb) as collector, stop_at_ctrl_c() as stopped:
        began, updates, explored = time.monotonic(), 0, 0
        bar = tqdm(total=config.seconds, bar_format="{n:.0f} of {total:.0f} s |{bar:10}| {desc}")
        while not history.solved and not stopped and time.monotonic() - began < config.seconds:
            loss = learner.update(rb.sample())
            updates += 1
            if updates % config.update_weights_every == 0:
                exit_if_a_worker_died(collector)
                exploration.step(rb.write_count - explored)
                explored = rb.write_count
                collector.update_policy_weights_()
                bar.n = min(time.monotonic() - began, config.seconds)
                bar.set_description_str(
                    f"{updates:,} updates, {explored:,} steps, random {exploration.eps.item():.2f}, "
                    f"loss {loss:.3f}; {history}"
                )
            if updates % config.evaluate_every == 0:
                with learner.steady(network):
                    length = evaluate(network, config, config.seed + updates)
                history.seconds.append(time.monotonic() - began)
                history.updates.append(updates)
                history.steps.append(rb.write_count)
                history.lengths.append(length)
        bar.close()
        if stopped:
            print("Stopped by Ctrl-C.")


@contextmanager
def stop_at_ctrl_c() -> Iterator[list[int]]:
    """Yield a list that is empty until Ctrl-C.

    Within a loss, tensordict 0.14 would turn a KeyboardInterrupt into a RuntimeError.
    """
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def draw(config: Config, history: History) -> Path:
    config.out.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axis.plot(history.steps, history.lengths, color="#2a6fb0", marker="o", ms=4)
    axis.axhline(SOLVED, color="#8a8a8a", ls="--", lw=1)
    axis.text(0.005, SOLVED, "solved", color="#8a8a8a", va="bottom", transform=axis.get_yaxis_transform())
    axis.set(title=f"Recurrent DQN, CartPole without velocities: seed {config.seed}")
    axis.set(xlabel="steps of the workers", ylim=(0, 1.06 * EPISODE_STEPS), xlim=(0, None))
    axis.set(ylabel=f"steps until the pole falls\n(mean of {config.evaluation_episodes} greedy episodes)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    path = config.out / "training.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(config: Config) -> None:
    # The workers use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    history = History()
    train(config, history)
    print(f"{'Solved' if history.solved else 'Not solved'}: {history}")
    print(f"  {draw(config, history)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the start of the workers
        print("Stopped by Ctrl-C.")
