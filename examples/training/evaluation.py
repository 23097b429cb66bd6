"""Evaluation of a policy on goals outside the training data, in a process beside the training."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, get_start_method
from multiprocessing.connection import Connection

import gymnasium
import torch
from policies import ChunkPolicy

from embodichain_rl.engine.processes import starting_processes

MakeEnv = Callable[[], gymnasium.Env]
"""A function that makes an environment in any process, such as a `functools.partial` of `gymnasium.make`."""


def roll_out(env: gymnasium.Env, policy: ChunkPolicy, actions_per_chunk: int, seed: int) -> Iterator[bool]:
    """Act for one episode. Yield after each step whether the goal is reached."""
    observation, _ = env.reset(seed=seed)
    while True:
        for action in policy.act(observation)[:actions_per_chunk]:
            observation, _, terminated, truncated, info = env.step(action)
            yield bool(info["is_success"])
            if terminated or truncated:
                return


def success_rate(env: gymnasium.Env, policy: ChunkPolicy, actions_per_chunk: int, seeds: Sequence[int]) -> float:
    """Return the fraction of the episodes, one per seed, in which the goal is reached at the end."""
    successes = 0
    for seed in seeds:
        *_, success = roll_out(env, policy, actions_per_chunk, seed)
        successes += success
    return successes / len(seeds)


class Evaluator:
    """A process that evaluates policies in sequence.

    Each evaluation has different goals, so that a policy can't pass by handling particular goals.

    Args:
        make_env: makes the environment.
        policy: the policy that the weights belong to.
        episodes: number of episodes of an evaluation.
        actions_per_chunk: number of actions of a chunk that are executed before the policy plans again.
        first_seed: seed of the goals of the first episode. The following episodes use the following seeds.
    """

    def __init__(
        self, make_env: MakeEnv, policy: ChunkPolicy, episodes: int, actions_per_chunk: int, first_seed: int
    ) -> None:
        # Tensors are passed in shared memory, where the training would change them.
        policy = copy.deepcopy(policy).cpu()
        context = get_context(get_start_method(allow_none=True) or "spawn")  # as the engine does
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_evaluate_forever,
            args=(self._theirs, make_env, policy, episodes, actions_per_chunk, first_seed),
            daemon=True,
        )
        self.busy = False

    def __enter__(self) -> Evaluator:
        with starting_processes():
            self._process.start()
        self._theirs.close()  # otherwise this process would not notice that the other end is closed
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def begin(self, policy: ChunkPolicy) -> None:
        """Start the evaluation of the current policy; :meth:`success` returns the result."""
        self._connection.send_bytes(_packed(policy))
        self.busy = True

    def success(self) -> float | None:
        """Return the fraction of successful episodes, or None if there is no new result."""
        if not self.busy or not self._connection.poll():
            return None
        self.busy = False
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("The evaluation has ended; if it raised, its traceback is printed above.") from None


def _evaluate_forever(
    connection: Connection,
    make_env: MakeEnv,
    policy: ChunkPolicy,
    episodes: int,
    actions_per_chunk: int,
    first_seed: int,
) -> None:
    torch.set_num_threads(1)
    env = make_env()
    for first in itertools.count(first_seed, episodes):
        try:
            policy.load_state_dict(_unpacked(connection.recv_bytes()))
        except EOFError:  # the training has ended
            return
        connection.send(success_rate(env, policy, actions_per_chunk, range(first, first + episodes)))


def _packed(policy: ChunkPolicy) -> bytes:
    """Return the weights as bytes, so that further training does not change them."""
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    return file.getvalue()


def _unpacked(weights: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
