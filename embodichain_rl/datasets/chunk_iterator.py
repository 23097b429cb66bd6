"""One iteration over a dataset: lengths, draws, transforms and the state to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl._compiling import graph_break
from embodichain_rl.datasets.flat import flat_dict
from embodichain_rl.datasets.loader_batch import loader_batch_size
from embodichain_rl.datasets.pass_sharing import PassSharing, Sharer
from embodichain_rl.datasets.progress import Progress
from embodichain_rl.datasets.sources import ChunkSource, takes_chunk_queries
from embodichain_rl.datasets.transport import outgoing_memory
from embodichain_rl.datasets.waiting import wait_for
from embodichain_rl.errors import ChunkShapeError, InvalidArgumentError
from embodichain_rl.replay.host import gathering_into
from embodichain_rl.replay.sampling import ChunkSampler, PassEndedError, PassPosition, drawing_with
from embodichain_rl.replay.schema import MASK

__all__ = ["ChunkIterator"]


class ChunkIterator(Iterator[Any]):
    """One iteration over a dataset: draws its items one after the other.

    Args:
        source: the source of chunks.
        sampler: what is drawn from it.
        progress: how far the iteration has come.
        batch_size: chunks of an item; None for single chunks.
        transform: called with each item; None for none.
        as_dict: whether items are plain dicts with flat keys.
        wait: the number of seconds to wait for data; None for an error at once.
        sharing: without replacement, the passes that are drawn from; None with replacement.
        sharer: the process that iterates, as one of those that share the passes.

    Not a generator: a generator ends with its first error, but a batch that the buffer could not provide yet may be
    available at the next call.
    """

    def __init__(
        self,
        source: ChunkSource,
        sampler: ChunkSampler,
        progress: Progress,
        *,
        batch_size: int | None,
        transform: Callable[[TensorDict], Any] | None,
        as_dict: bool,
        wait: float | None,
        sharing: PassSharing | None,
        sharer: Sharer,
    ) -> None:
        self._source = source
        self._takes_queries = takes_chunk_queries(source)
        self._datasets_sampler = self._sampler = sampler
        self._progress = progress
        self._batch_size = batch_size
        self._transform = transform
        self._as_dict = as_dict
        self._wait = wait
        self._sharing = sharing
        self._sharer = sharer
        self._dealing = False
        self._generator = torch.Generator()
        # Single chunks are copied again when they are collated, and only the collated batch goes to shared memory.
        self._memory = None if batch_size is None else outgoing_memory()

    def _begin_dealing(self, sharing: PassSharing) -> None:
        """Take a share of the passes. Only when the first item is drawn: its caller decides on the blocks."""
        position = self._progress.resumed_pass
        block = self._batch_size or loader_batch_size() or 1
        deal = sharing.deal(self._progress.iteration, self._sharer, position, block)
        self._sampler = self._datasets_sampler.dealing(deal, position)
        self._dealing = True

    def _pass_position(self) -> PassPosition | None:
        if self._sharing is None:
            return None
        if self._dealing:
            return self._sampler.pass_position()
        return self._progress.resumed_pass or self._sharing.start(self._sharer)

    @graph_break
    def __next__(self) -> Any:
        try:
            return self._next()
        except PassEndedError:
            raise StopIteration from None
        except Exception:
            self._progress.abandon_batch()
            raise

    def _next(self) -> Any:
        count = self._batch_size or 1
        length = self._next_length()
        if self._sharing is not None and not self._dealing:
            self._begin_dealing(self._sharing)
        query = self._sampler.query(length)
        chunk_query: Any = query if self._takes_queries else length

        def draw() -> TensorDict:
            # Seeded for every item, so that an item does not depend on how many numbers the earlier items consumed. An
            # item consumes more if a trajectory is evicted while it is read.
            self._generator.manual_seed(self._progress.seed)
            with gathering_into(self._memory):
                return self._source.sample_chunks(count, chunk_query, generator=self._generator)

        data = wait_for(draw, self._wait)
        drawn = len(data) if isinstance(data, TensorDictBase) and data.ndim and self._ends(len(data)) else count
        if not isinstance(data, TensorDictBase) or tuple(data.shape) != query.request.batch_shape(drawn):
            got = f"a batch of shape {list(data.shape)}" if isinstance(data, TensorDictBase) else type(data).__name__
            raise ChunkShapeError(
                f"Requested {count} chunk(s) of {length} steps, but got {got}. The source must return a TensorDict "
                "[batch_size, chunk_size]."
            )
        self._progress.advance()
        if self._batch_size is None:
            data = data[0]
            if callable(self._progress.chunk_size) and self._sampler.pad == "none":
                device = next(iter(data.values(True, True))).device
                data.set(MASK, torch.ones(query.request.length, dtype=torch.bool, device=device))
        item: Any = data
        if self._transform is not None:
            with drawing_with(self._generator):
                item = self._transform(data)
        return self._flat(item) if self._as_dict else item

    def _flat(self, item: Any) -> dict[str, Any]:
        if not isinstance(item, TensorDictBase):
            raise InvalidArgumentError(
                f"Got a {type(item).__name__} from transform={self._transform!r}; as_dict=True turns TensorDicts into "
                "dicts. Let the transform return a TensorDict, or leave out as_dict."
            )
        return flat_dict(item)

    def _ends(self, drawn: int) -> bool:
        """Return whether a batch of ``drawn`` chunks may be the end of the last pass."""
        return self._sharing is not None and 0 < drawn <= (self._batch_size or 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this iteration; see ``OnlineDataset.state_dict``."""
        return self._progress.state_dict(self._pass_position())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``.

        Raises:
            StateMismatchError: ``state`` belongs to another dataset, worker, number of workers or rank.
        """
        self._progress.load_state_dict(state)
        self._dealing = False

    def _next_length(self) -> int | None:
        progress = self._progress
        if self._batch_size is not None or not callable(progress.chunk_size) or not progress.begins_batch:
            return progress.next_length()
        return progress.next_length(loader_batch_size() or 1)
