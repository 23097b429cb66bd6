"""One iteration over a dataset: lengths, draws, transforms and the state to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl._compiling import graph_break
from embodichain_rl.datasets.flat import flat_dict
from embodichain_rl.datasets.items import Collated, ItemBlock
from embodichain_rl.datasets.loader_batch import loader_batch_size
from embodichain_rl.datasets.pass_sharing import PassSharing, Sharer
from embodichain_rl.datasets.progress import Progress
from embodichain_rl.datasets.sources import ChunkSource, draws_streams, takes_chunk_queries
from embodichain_rl.datasets.transport import OutgoingMemory, outgoing_memory
from embodichain_rl.datasets.waiting import wait_for
from embodichain_rl.errors import ChunkShapeError, EmbodiChainRLError, InvalidArgumentError
from embodichain_rl.replay.host import gathering_into
from embodichain_rl.replay.sampling import (
    ChunkDrawer,
    ChunkQuery,
    PassEndedError,
    PassPosition,
    RandomStreams,
    Turn,
    drawing_with,
)
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
        sampler: ChunkDrawer,
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
        self._yields_items = batch_size is None and transform is None and not as_dict
        self._wait = wait
        self._sharing = sharing
        self._sharer = sharer
        self._dealing = False
        self._generator = torch.Generator()
        self._memory = outgoing_memory()
        self._collated = Collated()
        self._block: ItemBlock | None = None  # the latest items that were drawn together
        self._ready: list[Any] = []  # those that are not handed out yet, the last one first: items, or their numbers
        self._streams: RandomStreams | None = None  # what they were drawn with; None: the generator
        self._turns: Sequence[Turn] = ()  # without replacement, where the passes are after each of them
        self._counted = 0  # the number of them that the progress has counted

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
            turn = self._turns[self._counted - 1] if self._counted and self._turns else None
            return self._sampler.dealt_draws.position(turn)
        return self._progress.resumed_pass or self._sharing.start(self._sharer)

    @graph_break
    def __next__(self) -> Any:
        if self._ready and self._yields_items:
            return self._ready.pop()
        try:
            return self._next()
        except PassEndedError:
            raise StopIteration from None
        except Exception:
            self._count_handed_out()
            self._progress.abandon_batch()
            if callable(self._progress.chunk_size):
                self._forget_block()  # the next item begins a batch, of another length
            raise

    def _next(self) -> Any:
        if self._batch_size is not None:
            return self._finished(self._draw_batch(self._batch_size))
        if not self._ready:
            self._draw_block()
        if self._yields_items:
            return self._ready.pop()
        block, number = self._block, self._ready.pop()
        assert block is not None, "it was drawn"
        if self._transform is None and self._as_dict:
            return block.flat_item(number)
        return self._finished(block.item(number))

    def _finished(self, data: TensorDict) -> Any:
        """Return what the dataset yields for an item."""
        item: Any = data
        if self._transform is not None:
            with drawing_with(self._generator_of_item):
                item = self._transform(data)
        return self._flat(item) if self._as_dict else item

    # ------------------------------------------------------------------------------------------------ whole batches

    def _draw_batch(self, count: int) -> TensorDict:
        length, query = self._next_query()
        data = self._drawn(count, length, query, self._memory)
        self._progress.advance()
        return data

    def _next_query(self) -> tuple[int | None, ChunkQuery]:
        length = self._next_length()
        if self._sharing is not None and not self._dealing:
            self._begin_dealing(self._sharing)
        return length, self._sampler.query(length)

    def _drawn(
        self,
        count: int,
        length: int | None,
        query: ChunkQuery,
        memory: OutgoingMemory | None,
        streams: RandomStreams | None = None,
    ) -> TensorDict:
        """Draw a batch.

        Args:
            count: the number of chunks.
            length: the steps of each; None with windows.
            query: what is drawn.
            memory: what it is gathered into.
            streams: the random numbers of each chunk; None: one generator for all of them.
        """
        chunk_query: Any = query if self._takes_queries else length
        source: Any = self._source

        def draw() -> TensorDict:
            # Seeded for every item, so that an item does not depend on how many numbers the earlier items consumed. An
            # item consumes more if a trajectory is evicted while it is read.
            generator = self._generator.manual_seed(self._progress.seed) if streams is None else streams
            with gathering_into(memory):
                data: TensorDict = source.sample_chunks(count, chunk_query, generator=generator)
                return data

        data = wait_for(draw, self._wait if streams is None else None)
        drawn = len(data) if isinstance(data, TensorDictBase) and data.ndim and self._ends(len(data), count) else count
        if not isinstance(data, TensorDictBase) or tuple(data.shape) != query.request.batch_shape(drawn):
            got = f"a batch of shape {list(data.shape)}" if isinstance(data, TensorDictBase) else type(data).__name__
            raise ChunkShapeError(
                f"Requested {count} chunk(s) of {length} steps, but got {got}. The source must return a TensorDict "
                "[batch_size, chunk_size]."
            )
        return data

    # ----------------------------------------------------------------------------------------------------- single items

    def _draw_block(self) -> None:
        """Draw the next items together: as many as make a batch of the ``DataLoader``, as far as this is known."""
        self._count_handed_out()
        self._forget_block()
        length, query = self._next_query()
        count = self._next_count()
        data = self._several(count, length, query) if count > 1 else None
        if data is None:  # what goes wrong with several items may not concern the first
            self._turns, self._streams = (), None
            data = self._drawn(1, length, query, None)
        if callable(self._progress.chunk_size) and self._sampler.pad == "none":
            device = next(iter(data.values(True, True))).device
            data.set(MASK, torch.ones(data.shape, dtype=torch.bool, device=device))
        self._block = ItemBlock(data, self._progress.position, self._collated)
        self._ready = self._block.unread_items() if self._yields_items else [*range(len(data) - 1, -1, -1)]

    def _next_count(self) -> int:
        """Return how many items to draw together."""
        if not draws_streams(self._source):
            return 1
        size = loader_batch_size() or self._collated.size or 1
        position = self._progress.position
        if self._collated.size == size and self._collated.end <= position:
            size -= (position - self._collated.end) % size  # up to the end of the batch
        return min(size, self._progress.items_left) if callable(self._progress.chunk_size) else size

    def _several(self, count: int, length: int | None, query: ChunkQuery) -> TensorDict | None:
        """Draw items together, each as if it was drawn alone; return None if that is not possible."""
        streams = self._streams = self._progress.streams(count)
        # Items that are collated as they are go to another process; others are read here first.
        memory = self._memory if self._yields_items else None
        if self._sharing is None:
            try:
                return self._drawn(count, length, query, memory, streams)
            except EmbodiChainRLError:
                return None
        draws = self._sampler.dealt_draws
        with draws.in_one_pass() as turns:
            try:
                data = self._drawn(count, length, query, memory, streams)
            except EmbodiChainRLError:
                draws.go_back(turns)
                return None
        if len(turns) != len(data):  # some were evicted meanwhile, so that others came out of turn
            draws.go_back(turns)
            return None
        self._turns = turns
        return data

    def _generator_of_item(self) -> torch.Generator:
        """Return the generator of the item that was handed out last, behind what it was drawn with."""
        if self._streams is None or self._block is None:
            return self._generator
        return self._streams.generator(len(self._block.data) - len(self._ready) - 1, self._generator)

    def _count_handed_out(self) -> None:
        """Have the progress count the items of the block that were handed out."""
        if self._block is not None:
            handed_out = len(self._block.data) - len(self._ready)
            self._progress.advance(handed_out - self._counted)
            self._counted = handed_out

    def _forget_block(self) -> None:
        self._block, self._ready, self._turns, self._counted = None, [], (), 0

    def _flat(self, item: Any) -> dict[str, Any]:
        if not isinstance(item, TensorDictBase):
            raise InvalidArgumentError(
                f"Got a {type(item).__name__} from transform={self._transform!r}; as_dict=True turns TensorDicts into "
                "dicts. Let the transform return a TensorDict, or leave out as_dict."
            )
        return flat_dict(item)

    def _ends(self, drawn: int, count: int) -> bool:
        """Return whether a batch of ``drawn`` chunks may be the end of a pass."""
        return self._sharing is not None and 0 < drawn <= count

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this iteration; see ``OnlineDataset.state_dict``."""
        self._count_handed_out()
        return self._progress.state_dict(self._pass_position())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``.

        Raises:
            StateMismatchError: ``state`` belongs to another dataset, worker, number of workers or rank.
        """
        self._progress.load_state_dict(state)
        self._forget_block()
        self._collated.size = 0
        self._dealing = False

    def _next_length(self) -> int | None:
        progress = self._progress
        if self._batch_size is not None or not callable(progress.chunk_size) or not progress.begins_batch:
            return progress.next_length()
        return progress.next_length(loader_batch_size() or 1)
