"""The passes without replacement of one sampler, as they are saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import InvalidArgumentError, StateMismatchError
from embodichain_rl.replay.sampling.passes.dealing import PassRange

__all__ = ["SavedPass", "parse_passes"]


@dataclass(frozen=True, slots=True)
class SavedPass:
    """A pass under way: its chunks, in which order they come, and how many have had their turn.

    Attributes:
        length: the number of steps of a chunk.
        seed: the source of the order.
        number: the number of the pass.
        taken: the number of chunks that had their turn.
        first: the id of the first trajectory.
        end: the id after the last one.
        total: the number of chunks when the pass began.
        oldest_version: the oldest policy version that belongs to it.
    """

    length: int
    seed: int
    number: int
    taken: int
    first: int
    end: int
    total: int
    oldest_version: int

    def range(self, shift: int) -> PassRange:
        """Return the trajectories of the pass, whose ids are ``shift`` more than when it was saved."""
        return PassRange(self.first + shift, self.end + shift, self.total, self.oldest_version)

    def as_dict(self) -> dict[str, int]:
        """Return plain values."""
        return asdict(self)


def parse_passes(state: Any) -> list[SavedPass]:
    """Return the passes in the state of a sampler; none in the state of one that draws with replacement.

    Raises:
        StateMismatchError: when the state is something else.
    """
    passes = state.get("passes", ()) if isinstance(state, Mapping) else None
    names = set(SavedPass.__dataclass_fields__)
    if not isinstance(passes, list | tuple) or not all(isinstance(p, Mapping) and set(p) == names for p in passes):
        raise StateMismatchError(
            f"Got the state of a sampler {state!r}; needed is what ChunkSampler.state_dict() returned."
        )
    try:
        return [SavedPass(**{name: checked_int(name, p[name], minimum=-1) for name in names}) for p in passes]
    except InvalidArgumentError as error:
        raise StateMismatchError(f"Got the state of a sampler that is damaged: {error}") from None
