"""The state of a storage: saved, restored, and pickled."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np

from embodichain_rl.errors import CheckpointError, SchemaMismatchError
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import Schema, Shifted, refuse_unshifted
from embodichain_rl.replay.storage.handed_over import HandedOver
from embodichain_rl.replay.storage.places import PlacedStorage
from embodichain_rl.replay.storage.saving import SavedTrajectories, state_of

__all__ = ["RestorableStorage"]


class RestorableStorage(PlacedStorage):
    """A storage whose live trajectories can be saved and restored; see :class:`TrajectoryStorage`."""

    handed_over: HandedOver

    def allocate_schema(self, schema: Schema, *, beside: int = 0) -> Schema:
        """Allocate the arena for steps of ``schema``, unless it is allocated; return the schema that it has."""
        raise NotImplementedError

    def shifted_in(self, schema: Schema) -> Shifted:
        """Return the fields of a schema that are read from another field, one step later."""
        raise NotImplementedError

    def check_length(self, length: int) -> None:
        """Refuse a trajectory that there is no room for."""
        raise NotImplementedError

    def write(
        self,
        pieces: Sequence[Sequence[np.ndarray]],
        of_trajectory: Sequence[np.ndarray] = (),
        *,
        policy_version: int = NO_VERSION,
    ) -> int:
        """Copy one whole trajectory into the arena and publish it."""
        raise NotImplementedError

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until every trajectory that was written before is live."""
        raise NotImplementedError

    def _retire(self) -> None:
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and, once allocated, the schema and copies of the live trajectories.

        Writers go on meanwhile. Trajectories that are evicted while they are copied are not in the state; at least half
        of the live ones are.

        Returns:
            A dict. Once allocated, it has

            * ``"values"``: one tensor per field, ``[steps, *shape]``, one trajectory after the other, oldest first, or
              ``[trajectories, *shape]``. Text is given by its index in ``"texts"``, a list of strings. Of ragged and
              compressed fields it is the bytes of all values, ``uint8``, and ``"blob_sizes"`` has the size of each.
            * ``"lengths"``: ``int64`` ``[trajectories]``; and a list of their ``"policy_versions"``.
            * ``"priority_weights"``: a list of their weights, once draws by priority have begun.
            * ``"ids"``: a list of their ids, where these are not consecutive; and ``"pinned"``, of bools, where some
              are pinned.
        """
        state: dict[str, Any] = {"next_id": self.ledger.next_id, "steps_written": self.ledger.steps_written}
        return state | (state_of(self.view, self.texts) if self.initialized else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the live trajectories by those of a state; they keep their weights by priority and their pins.

        They keep their ids too if this storage has given out none yet. Otherwise they get new ones, because ids are
        never reused.

        The weights are kept in the ledger whatever the sampler, and used as soon as one draws by priority. Without
        weights in the state, all trajectories get the same one. On a device, the weights are those of the state only
        if no other process writes at the same time.

        Raises:
            CheckpointError: when the state is damaged.
            SchemaMismatchError: when its steps have other keys than the arena was allocated for.
        """
        self.load_saved(SavedTrajectories.parse(state_dict))

    def load_saved(self, saved: SavedTrajectories) -> None:
        """Do what :meth:`load_state_dict` does with a state that is checked, whose values may be in files."""
        with self.texts.held():
            self._load(saved)

    def _load(self, saved: SavedTrajectories) -> None:
        schema = None if saved.schema is None else self._accept_saved(saved.schema, saved)
        self._retire()
        fresh = self.ledger.next_id == 0
        first = 0 if saved.ids is not None else max(0, saved.next_id - len(saved))
        self.ledger.resume_from(next_id=first if fresh else saved.next_id)
        first = self.ledger.next_id
        ids = np.arange(first, first + len(saved))  # the ids that trajectories get which a thread uploads
        keep_ids = fresh and not self.staged and saved.ids is not None
        trajectories = () if schema is None else saved.trajectories(schema, self.texts, self.formats)
        for number, (steps, trajectory_values, version) in enumerate(trajectories):
            if keep_ids:
                self.ledger.skip_to(saved.ids[number])  # type: ignore[index]
            written = self.write([steps], trajectory_values, policy_version=version)
            if not self.staged:
                ids[number] = written
                if saved.pinned is not None and saved.pinned[number]:
                    self.ledger.pin(ids[number : number + 1])
        self.flush()
        if keep_ids:
            self.ledger.skip_to(saved.next_id)
        if self.staged and saved.pinned is not None:
            self.ledger.pin(ids[np.array(saved.pinned)])
        if saved.priority_weights is not None:
            self.ledger.prioritize(ids, np.array(saved.priority_weights))
        self.ledger.count_steps_from(saved.steps_written)
        self.id_shift = self.ledger.next_id - saved.next_id

    def _accept_saved(self, described: Schema, saved: SavedTrajectories) -> Schema:
        """Return the schema of the storage; refuse what it can't hold."""
        if saved.longest > self.max_total_steps:
            raise CheckpointError(
                f"The checkpoint holds a trajectory of {saved.longest:,} steps, the storage at most "
                f"{self.max_total_steps:,} in all. Load it into a storage with a larger max_total_steps."
            )
        is_sized = self.initialized or not self._memory.sized_by_schema
        if is_sized:
            self._accept_pins(saved)
        if self.initialized and self.schema != described:
            raise SchemaMismatchError(f"The checkpoint holds {described}, the storage was allocated for {self.schema}.")
        schema = self.allocate_schema(self.formats.for_saved(described, saved.example))
        self.open_memory()
        if not is_sized:
            self._accept_pins(saved)
        self.check_length(saved.longest)
        self.texts.ids_of(np.concatenate([part.texts for part in saved.parts]), for_good=False)
        shifted = self.shifted_in(schema)
        if shifted and any(len(part.shifted) < len(shifted) for part in saved.parts):
            for steps, _, _ in saved.trajectories(schema, self.texts, self.formats):
                refuse_unshifted(schema, shifted, steps, before=None, step=0)
        return schema

    def _accept_pins(self, saved: SavedTrajectories) -> None:
        """Refuse more pinned trajectories than this storage may have."""
        pinned = [n for n, is_pinned in zip(saved.lengths.tolist(), saved.pinned or [], strict=False) if is_pinned]
        most, most_steps = self.ledger.pin_limits
        if len(pinned) > most or sum(pinned) > most_steps:
            raise CheckpointError(
                f"The checkpoint holds {len(pinned):,} pinned trajectories with {sum(pinned):,} steps, the storage may "
                f"have {most:,} with {most_steps:,}. Load it into one with a larger max_pinned, or larger limits."
            )

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            classes = [] if self.schema is None else self.schema.tensorclasses()  # unpickling imports them
            state = {"settings": self._settings(), "contents": self.state_dict(), "texts": self.texts}
            return {**state, "tensorclasses": classes}
        private = ("_opened", "_arena", "_table", "_attached_entities_list", "handed_over")
        self.handed_over.to_child()
        return {key: value for key, value in self.__dict__.items() if key not in private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "settings" in state:
            self.__init__(**state["settings"])  # type: ignore[misc]
            self.texts = state["texts"]  # transforms may refer to it
            self.load_state_dict(state["contents"])
        else:
            self.__dict__.update(state)
            self.handed_over = HandedOver(self, is_set=True)
            self._attached_entities_list = []
            self._start_unmapped()
