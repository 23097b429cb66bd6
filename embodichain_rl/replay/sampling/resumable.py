"""What TorchRL expects of a sampler that draws without replacement: its state, and when it has run out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from embodichain_rl.errors import StateMismatchError
from embodichain_rl.replay.sampling.draws import ChunkQuery, TrajectoryDraws
from embodichain_rl.replay.sampling.passes import DealtDraws, OnePassDraws, PassEndedError, PassToItsEnd, parse_passes
from embodichain_rl.replay.sampling.random_streams import RandomSource
from embodichain_rl.replay.sampling.stateless import StatelessSampler
from embodichain_rl.replay.schema import ORIGIN_KEYS, Key
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["ResumableSampler"]

Drawn = TypeVar("Drawn")

PASSES = "passes.json"
"""The file of a checkpoint with the passes under way."""


class ResumableSampler(StatelessSampler):
    """A sampler whose passes without replacement can be saved and restored; without any it has no state."""

    _draws: TrajectoryDraws
    _queries: dict[int | None, ChunkQuery]
    _ran_out = False
    _until_end: ChunkQuery | None = None

    @property
    def _passes(self) -> OnePassDraws | None:
        draws = self._draws
        return draws if isinstance(draws, OnePassDraws) and not isinstance(draws, DealtDraws) else None

    @property
    def ran_out(self) -> bool:
        """Whether the last batch of a plain TorchRL buffer was the last one of a pass; False with replacement."""
        return self._ran_out

    @ran_out.setter
    def ran_out(self, value: bool) -> None:
        self._ran_out = bool(value)

    @property
    def traj_key(self) -> Key:
        """The key of a batch that tells its trajectories apart; programs read it of ``SliceSampler``."""
        return ORIGIN_KEYS[0]

    def until_pass_ends(self, query: ChunkQuery) -> ChunkQuery:
        """Return a query for the rest of the pass under way, or for the next pass if none is.

        :meth:`ChunkSampler.sample_chunks` then returns fewer chunks than asked for, or raises ``PassEndedError``, at
        the end of the pass.

        Args:
            query: a query of a sampler that draws without replacement.
        """
        assert self._passes is not None, "a sampler without replacement"
        return query._replace(draws=PassToItsEnd(self._passes))

    def _draw_to_end(
        self,
        storage: TrajectoryReader,
        count: int,
        query: ChunkQuery,
        draw: Callable[[TrajectoryReader, int, ChunkQuery, RandomSource], Drawn],
    ) -> Drawn:
        """Draw for a plain TorchRL buffer: fewer chunks than asked for at the end of a pass."""
        passes = self._passes
        assert passes is not None, "checked by the caller"
        if self._until_end is None or self._until_end.request is not query.request:
            self._until_end = self.until_pass_ends(query)
        try:
            drawn = draw(storage, count, self._until_end, self._rng)
        except PassEndedError:  # of another storage, or evicted to the end
            self._until_end = self.until_pass_ends(query)
            drawn = draw(storage, count, self._until_end, self._rng)
        self._ran_out = passes.ended(storage, query.request)
        if self._ran_out:
            self._until_end = None
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the passes without replacement that are under way, as plain values; empty with replacement.

        They are of the storage that was last drawn from. A pass goes on over a buffer that the checkpoint of the same
        moment was loaded into.
        """
        passes = self._passes
        if passes is None:
            return {}
        saved = passes.saved({query.request.length: query.request for query in list(self._queries.values())})
        return {"passes": [one.as_dict() for one in saved]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved passes; see :meth:`state_dict`.

        Raises:
            StateMismatchError: when the state is something else. By the next draw: when the trajectories of the pass
                are not in the storage.
        """
        passes = self._passes
        saved = parse_passes(state_dict)
        if passes is not None:
            passes.resume(saved)
            self._ran_out, self._until_end = False, None

    def dumps(self, path: str | Path) -> None:
        """Write :meth:`state_dict` to the directory ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / PASSES).write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        """Load what :meth:`dumps` wrote; do nothing with a checkpoint that has no passes.

        Raises:
            StateMismatchError: when the file is damaged.
        """
        file = Path(path) / PASSES
        if not file.exists():
            return
        try:
            state = json.loads(file.read_text())
        except ValueError as error:
            raise StateMismatchError(f"No readable {PASSES} in {path}: {error}. Load another checkpoint.") from error
        self.load_state_dict(state)
