"""A recurrent DQN balances CartPole without seeing velocities, from chunks of episodes that come in meanwhile.

    worker 0: CartPole, GRU ── rb.extend(episode) ──┐
                                                    ├── shared memory ── rb.sample() ── DQNLoss ── this process
    worker 1: CartPole, GRU ── rb.extend(episode) ──┘
         ^────────────────── update_policy_weights_() ──────────────────────────────────────────────────┘

One observation does not tell where the pole is going, so the network has to remember, and is trained on chunks of
consecutive steps. All but the buffer is TorchRL's; with a `SliceSampler` these lines differ:

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

What it brings: every step of the buffer is drawn as often as any other, whether it is an episode's first or last, or
of one with fewer than `L` steps, and the few long episodes are not lost among the many short ones of the beginning;
workers and learner do not wait for each other's lock.

    python examples/rl/recurrent_dqn.py
    python examples/rl/recurrent_dqn.py --seed 1 --seconds 900
    python examples/rl/recurrent_dqn.py --help

It is solved when 100 greedy episodes last 475 of their 500 steps on average, which is Gymnasium's threshold.
"""

from __future__ import annotations

import signal

if __name__ == "__mp_main__":  # a worker, which imports this file
    # Ctrl-C reaches every process of a terminal. The main process shuts its workers down, so here it is ignored, and
    # before the imports that take seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gymnasium
import matplotlib

matplotlib.use("agg")  # no window, also where there is a screen

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
"""Of the observation: the cart's place and the pole's angle, without their velocities."""
SCALE = np.array([4.0, 20.0], np.float32)
"""Of both, so that what moves in one step can be told: velocities have to be read from differences."""
REWARD_SCALE = 0.1
"""A reward of 1 for each of 500 steps makes values that a network starts far away from."""


@dataclass(frozen=True)
class Config:
    """Train a recurrent DQN on CartPole with hidden velocities, while workers collect."""

    seconds: float = 600.0
    """When to stop at the latest, from the first update on."""
    seed: int = 0
    """Of the workers, the draws, the network and the evaluation."""
    num_workers: int = 2
    """Processes that step environments."""
    frames_per_batch: int = 100
    """Steps after which a worker takes over the weights that it was sent."""
    max_trajectories: int = 2000
    """Episodes that the buffer keeps at most, the newest."""
    max_total_steps: int = 20_000
    """Steps that it keeps at most, of all episodes. What older networks remembered, and the returns of what they did,
    tell little about the one that is trained."""
    chunk_size: int = 16
    """Steps of a chunk."""
    burn_in: int = 4
    """Of these the first, in which the network only gathers what it has to remember."""
    batch_size: int = 64
    """Chunks of an update."""
    hidden_size: int = 64
    """What the network remembers."""
    learning_rate: float = 1e-3
    learning_rate_decay: float = 0.999
    """Of the learning rate, at each update, so that a policy that balances is less easily lost again."""
    gamma: float = 0.99
    lmbda: float = 0.9
    """Of the TD(lambda) returns along a chunk, which carry news of a fall back over many steps at once."""
    target_update: float = 0.01
    """How far the target network goes towards the trained one at each update."""
    exploration_steps: int = 10_000
    """Steps until actions are random only now and then."""
    update_weights_every: int = 20
    """Updates after which the workers are sent the weights."""
    evaluate_every: int = 250
    """Updates between two evaluations."""
    evaluation_episodes: int = 100
    out: Path = Path("outputs/recurrent_dqn")
    """Folder for the picture."""


def seen(observation: np.ndarray) -> np.ndarray:
    return observation[..., SEEN] * SCALE


def make_env(config: Config) -> TransformedEnv:
    box = gymnasium.spaces.Box(-np.inf, np.inf, [len(SEEN)])
    env = GymWrapper(gymnasium.wrappers.TransformObservation(gymnasium.make(ENVIRONMENT), seen, box))
    # They say where episodes begin, and carry from step to step what the network remembers.
    size = config.hidden_size
    memory = make_memory(nn.GRU(size, size, batch_first=True), ("next", "memory")).make_tensordict_primer()
    return TransformedEnv(env, Compose(InitTracker(), memory, RewardScaling(0.0, REWARD_SCALE)))


def make_memory(gru: nn.GRU, written_to: NestedKey) -> GRUModule:
    return GRUModule(gru=gru, in_keys=["features", "memory"], out_keys=["features", written_to])


def make_networks(config: Config) -> tuple[TensorDictSequential, TensorDictSequential]:
    """From what is seen, and what is remembered, to the values of both actions and the greedy one.

    Returns the network that acts and the one that is trained, which have their weights in common. Over a whole chunk a
    GRUModule writes zeros for all states but the last. The one that is trained writes them aside: the values of the
    next observations have to begin with what the worker remembered then, as those of the observations do.
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
    """Workers that act with the policy and write whole episodes; the block begins when there is one."""
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
    """TorchRL does not say so when a worker that was started with start() dies."""
    if any(worker.exitcode is not None for worker in collector.procs):
        raise SystemExit("A worker has ended; if it raised, its traceback stands above.")


class Learner:
    """Double Q-learning on chunks; the first steps of each are only looked at."""

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
        # Steps before an episode's beginning and behind its end are padding.
        loss = masked_mean(errors[:, self._burn_in :], batch["collector", "mask"][:, self._burn_in :])
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._loss.parameters(), 10.0)
        self._optimizer.step()
        self._schedule.step()
        self._target.step()
        return loss.item()

    def steady(self, network: TensorDictSequential) -> AbstractContextManager[object]:
        """The network with the target's weights meanwhile: its actions change less from update to update."""
        return self._loss.target_value_network_params.to_module(network)


@torch.no_grad()
def evaluate(network: TensorDictSequential, config: Config, seed: int) -> float:
    """How many steps its episodes last on average; they are played all at once, without exploration."""
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
    """What the evaluations were, and what had been done by then."""

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
    """Until it is solved, or the time is up."""
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
    """What it yields is empty until Ctrl-C.

    A KeyboardInterrupt within a loss would be turned into a RuntimeError by tensordict 0.14.
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
    # The cores are the workers'; a network this small gains nothing from more of them.
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    history = History()
    train(config, history)
    print(f"{'Solved' if history.solved else 'Not solved'}: {history}")
    print(f"  {draw(config, history)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # while the workers were started
        print("Stopped by Ctrl-C.")
