"""What the ranks and the workers that share the passes of a dataset agree on, before they begin one."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.data import get_worker_info

from embodichain_rl._checks import checked_int
from embodichain_rl.datasets.streams import Rank
from embodichain_rl.errors import InvalidArgumentError, StateMismatchError
from embodichain_rl.replay.sampling import Deal, PassPosition

__all__ = ["PassSharing", "Sharer", "check_passes"]


class Sharer(NamedTuple):
    """One of the processes that share a pass."""

    rank: Rank
    worker: int
    workers: int
    """The number of workers of each rank, at least 1."""

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.rank.world_size or 1

    @property
    def shares(self) -> int:
        """The number of processes that share a pass."""
        return self.workers * self.ranks

    @property
    def share(self) -> int:
        """The number of this process among them. The shares of the first workers of all ranks come first."""
        return self.worker * self.ranks + self.rank.rank


def check_passes(passes: Any, drop_last: Any, *, replacement: bool, mixture: bool) -> int | None:
    """Return the argument ``passes`` of a dataset.

    Raises:
        InvalidArgumentError: ``passes`` or ``drop_last`` is invalid, or does not go with the other arguments.
    """
    passes = None if passes is None else checked_int("passes", passes, minimum=1)
    if not isinstance(drop_last, bool):
        raise InvalidArgumentError(f"Got drop_last={drop_last!r}; it must be True or False.")
    if replacement and passes is not None:
        raise InvalidArgumentError(
            f"Got passes={passes}, which needs replacement=False: with replacement, draws have no end."
        )
    if drop_last and passes is None:
        raise InvalidArgumentError(
            "Got drop_last=True without passes=: an iteration without end has no last batch. For the batches that a "
            "DataLoader collates, give drop_last=True to the DataLoader."
        )
    if mixture and not replacement:
        raise InvalidArgumentError(
            "Got replacement=False with several sources: a mixture has no pass. Draw with replacement, or use one "
            "dataset for each source."
        )
    return passes


class PassSharing:
    """The passes of a dataset without replacement, which the ranks and workers that have the dataset share.

    Args:
        arguments: the arguments of the dataset, by name.
        rank: the rank of the process that makes the dataset.
    """

    def __init__(self, arguments: Mapping[str, Any], rank: Rank) -> None:
        self._arguments = arguments
        self._made_in = os.getpid()
        identity = _identity_of_all_ranks(arguments) if (rank.world_size or 1) > 1 else None
        self._is_of_all_ranks = identity is not None
        self._identity = secrets.randbits(62) if identity is None else identity

    def check(self, rank: Rank) -> None:
        """Refuse to begin a pass in ranks that could not agree on it.

        Raises:
            InvalidArgumentError: the number of ranks is unknown; or each rank made a dataset without a seed, before
                ``torch.distributed`` was initialised.
        """
        if rank.world_size is None:
            raise InvalidArgumentError(
                f"Got RANK={rank.rank} in the environment without WORLD_SIZE, and replacement=False: the ranks share "
                "each pass. Set WORLD_SIZE, as torchrun does, or give rank= and world_size=."
            )
        parent = multiprocessing.parent_process()
        here = os.getpid() if get_worker_info() is None or parent is None else parent.pid
        agreed = self._is_of_all_ranks or self._arguments["seed"] is not None
        if rank.world_size > 1 and not agreed and here == self._made_in:
            raise InvalidArgumentError(
                f"Got replacement=False without a seed, in rank {rank.rank} of {rank.world_size}: the ranks could not "
                "agree on the order of a pass. Give the same seed= in all ranks, make the dataset after "
                "torch.distributed.init_process_group or before the ranks are started, or give rank=0, world_size=1 "
                "for a whole pass in each rank."
            )

    @property
    def _seed(self) -> int:
        seed = self._arguments["seed"]
        return self._identity if seed is None else seed

    def start(self, sharer: Sharer) -> PassPosition:
        """Return the position before the first pass."""
        return PassPosition(self._seed, sharer.shares)

    def deal(self, iteration: int, sharer: Sharer, position: PassPosition | None, block: int) -> Deal:
        """Return the share of the passes of one iteration that belongs to a process.

        Args:
            iteration: the number of the iteration.
            sharer: the process.
            position: where the iteration is resumed; None: it is a new one.
            block: the number of chunks of a batch.

        Raises:
            StateMismatchError: at ``position``, another number of processes shared the passes.
        """
        if position is not None and position.shares != sharer.shares:
            raise StateMismatchError(
                f"Got the state of a pass that {position.shares} processes share, workers times ranks, but here are "
                f"{sharer.shares}. Use the same number of workers and ranks as when the state was saved."
            )
        return Deal(
            seed=self._seed if position is None else position.seed,
            identity=self._identity,
            iteration=iteration,
            share=sharer.share,
            shares=sharer.shares,
            block=block if position is None else position.block or block,
            passes=self._arguments["passes"],
            drop_last=self._arguments["drop_last"],
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if get_spawning_popen() is None:  # a copy goes through passes of its own
            state |= {"_identity": secrets.randbits(62), "_is_of_all_ranks": False, "_made_in": os.getpid()}
        return state


_made: Counter[str] = Counter()
"""The number of datasets that were made in this process, by their arguments."""


def _identity_of_all_ranks(arguments: Mapping[str, Any]) -> int | None:
    """Return the identity of the datasets that all ranks make alike; None if they can't agree on it.

    With a seed it is a function of the arguments, and otherwise the first rank tells it to the others through the store
    of ``torch.distributed``.
    """
    alike = repr(arguments)
    number = _made[alike]
    _made[alike] += 1
    if arguments["seed"] is not None:
        sequence = np.random.SeedSequence([arguments["seed"], zlib.crc32(alike.encode()), number])
        return int(sequence.generate_state(1, np.uint64)[0]) >> 2
    if not dist.is_available() or not dist.is_initialized():
        return None
    key = f"embodichain_rl/passes/{zlib.crc32(alike.encode())}/{number}"
    return int(_get_default_store().compare_set(key, "", str(secrets.randbits(62))))
