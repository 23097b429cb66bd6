"""Tries a policy on goals that it was not trained on, in a process beside the training."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import gymnasium
import torch
from policies import ChunkPolicy

from embodichain_rl.engine.foreground import without_ctrl_c

ENVIRONMENT = "expert_env:PickAndPlaceExpert-v0"


def roll_out(env: gymnasium.Env, policy: ChunkPolicy, actions_per_chunk: int, seed: int) -> Iterator[bool]:
    """Act for one episode; says after each step whether the cube is at its goal."""
    observation, _ = env.reset(seed=seed)
    while True:
        for action in policy.act(observation)[:actions_per_chunk]:
            observation, _, terminated, truncated, info = env.step(action)
            yield bool(info["is_success"])
            if terminated or truncated:
                return


def success_rate(env: gymnasium.Env, policy: ChunkPolicy, actions_per_chunk: int, seeds: Sequence[int]) -> float:
    """The part of the episodes, one for each seed, in which the cube is at its goal in the end."""
    successes = 0
    for seed in seeds:
        *_, success = roll_out(env, policy, actions_per_chunk, seed)
        successes += success
    return successes / len(seeds)


class Evaluator:
    """A process that evaluates one policy after the other.

    Each evaluation has goals of its own, so that none can be passed by doing well on certain ones.

    Args:
        policy: what the weights to come belong to.
        episodes: how many make an evaluation.
        actions_per_chunk: how many actions of a chunk are taken before the policy is asked again.
        first_seed: of the goals of the first episode; the others follow.
    """

    def __init__(self, policy: ChunkPolicy, episodes: int, actions_per_chunk: int, first_seed: int) -> None:
        policy = copy.deepcopy(policy).cpu()  # what is handed over lies in shared memory, and would be trained there
        context = get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_evaluate_forever,
            args=(self._theirs, policy, episodes, actions_per_chunk, first_seed),
            daemon=True,
        )
        self.busy = False

    def __enter__(self) -> Evaluator:
        with without_ctrl_c():
            self._process.start()
        self._theirs.close()  # else this process would not notice that the other end is gone
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def begin(self, policy: ChunkPolicy) -> None:
        """Evaluate the policy as it is now; the outcome is told by :meth:`success`."""
        self._connection.send_bytes(_packed(policy))
        self.busy = True

    def success(self) -> float | None:
        """The part of the episodes that were a success; None while there is nothing to tell."""
        if not self.busy or not self._connection.poll():
            return None
        self.busy = False
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("The evaluation has ended; if it raised, its traceback stands above.") from None


def _evaluate_forever(
    connection: Connection, policy: ChunkPolicy, episodes: int, actions_per_chunk: int, first_seed: int
) -> None:
    torch.set_num_threads(1)
    env = gymnasium.make(ENVIRONMENT)
    for first in itertools.count(first_seed, episodes):
        try:
            policy.load_state_dict(_unpacked(connection.recv_bytes()))
        except EOFError:  # the training is over
            return
        connection.send(success_rate(env, policy, actions_per_chunk, range(first, first + episodes)))


def _packed(policy: ChunkPolicy) -> bytes:
    """The weights as bytes, so that training on does not change what is evaluated."""
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    return file.getvalue()


def _unpacked(weights: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
