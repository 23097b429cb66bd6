"""The options of a sampler that say what a chunk is, and the request that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embodichain_rl._checks import checked_int, checked_key
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.sampling.requests.chunk_requests import ChunkRequest, PaddedRequest, ShortRequest
from embodichain_rl.replay.sampling.requests.offsets import OffsetRange
from embodichain_rl.replay.sampling.requests.window_requests import WindowRequest
from embodichain_rl.replay.sampling.requests.windows import TimedWindows, Windows
from embodichain_rl.replay.schema import Key

__all__ = ["PADS", "SAMPLING_MODES", "RequestOptions"]

SAMPLING_MODES = ("episode", "segment", "boundary")
PADS = ("none", "before", "after", "both")


@dataclass(frozen=True)
class RequestOptions:
    """What a chunk is, but for its length; see :class:`~embodichain_rl.ChunkSampler`.

    Raises:
        InvalidArgumentError: by :meth:`checked` and :meth:`request`, when the options can't be combined.
    """

    sampling_mode: str = "episode"
    pad: str = "none"
    pad_before: int | None = None
    pad_after: int | None = None
    windows: Windows | TimedWindows | None = None
    stride: int = 1
    drop_n_first_frames: int = 0
    drop_n_last_frames: int = 0
    strict_length: bool = True
    init_key: Key | None = None
    squeeze: bool = False

    @classmethod
    def checked(cls, **options: Any) -> RequestOptions:
        """Return the options, each of them checked."""
        for name, allowed in (("sampling_mode", SAMPLING_MODES), ("pad", PADS)):
            if options[name] not in allowed:
                raise InvalidArgumentError(f"Got {name}={options[name]!r}; it must be one of {allowed}.")
        for name in ("pad_before", "pad_after"):
            if options[name] is not None:
                options[name] = checked_int(name, options[name], minimum=0)
                if options["pad"] != "none":
                    raise InvalidArgumentError(
                        f"Got pad={options['pad']!r} with {name}={options[name]}: pad reaches beyond an edge by as "
                        "many steps as possible. Give pad_before and pad_after, in steps, or pad."
                    )
        options["stride"] = checked_int("stride", options["stride"], minimum=1)
        for name in ("drop_n_first_frames", "drop_n_last_frames"):
            options[name] = checked_int(name, options[name], minimum=0)
        if not isinstance(options["strict_length"], bool):
            raise InvalidArgumentError(f"Got strict_length={options['strict_length']!r}; it must be True or False.")
        if not isinstance(options["squeeze"], bool):
            raise InvalidArgumentError(f"Got squeeze={options['squeeze']!r}; it must be True or False.")
        if options["init_key"] is not None:
            options["init_key"] = checked_key(options["init_key"])
        made = cls(**options)
        made._refuse_combinations()
        return made

    def _refuse_combinations(self) -> None:
        if self.sampling_mode == "boundary" and (self._padded or self.windows is not None):
            raise InvalidArgumentError(
                "Got sampling_mode='boundary' with windows or padding: they go with 'episode' and 'segment' only."
            )
        if self.sampling_mode != "episode" and self.drop_n_first_frames:
            raise InvalidArgumentError(
                f"Got drop_n_first_frames={self.drop_n_first_frames} with sampling_mode={self.sampling_mode!r}: it "
                "goes with sampling_mode='episode' only."
            )
        if self.windows is not None and self.stride > 1:
            raise InvalidArgumentError(
                f"Got windows and stride={self.stride}: windows take lists of steps, such as [-8, -4, 0]."
            )
        if self.windows is not None and self.init_key is not None:
            raise InvalidArgumentError(
                f"Got windows and init_key={self.init_key!r}: a window has no first step. Use chunks, by chunk_size."
            )
        if self.strict_length:
            return
        others = {
            "windows": self.windows is not None,
            f"sampling_mode={self.sampling_mode!r}": self.sampling_mode != "episode",
            "pad, pad_before or pad_after": self._padded,
            "drop_n_first_frames or drop_n_last_frames": bool(self.drop_n_first_frames or self.drop_n_last_frames),
        }
        for name, given in others.items():
            if given:
                raise InvalidArgumentError(
                    f"Got strict_length=False with {name}: it pads trajectories that are shorter than a chunk, and no "
                    "others. Give one of the two; pad='after' lets every chunk reach beyond the end."
                )

    @property
    def _padded(self) -> bool:
        return self.pad != "none" or self.pad_before is not None or self.pad_after is not None

    @property
    def reads_whole_steps(self) -> bool:
        """Whether chunks are made of steps of a trajectory only, of which all keys are read, and nothing else."""
        return not self._padded and self.windows is None and self.strict_length and self.init_key is None

    def request(self, length: int | None, *, fixed: bool = True) -> ChunkRequest:
        """Return the request for these options.

        Args:
            length: the number of steps of a chunk; None with windows.
            fixed: whether all chunks have this length. Otherwise a chunk that is shorter than ``pad_before`` or
                ``pad_after`` is padded by at most all of its steps but one.
        """
        if self.squeeze and length != 1:
            raise InvalidArgumentError(
                f"Got squeeze=True with chunk_size {length}; only chunks of one step, chunk_size=1, are without the "
                "dimension of their steps. For longer ones in a flat layout use the transform FlatChunks."
            )
        request = self._request(length, fixed=fixed)
        request.init_key = self.init_key
        return request

    def _request(self, length: int | None, *, fixed: bool) -> ChunkRequest:
        drops = {"drop_first": self.drop_n_first_frames, "drop_last": self.drop_n_last_frames}
        if self.windows is not None:
            if length is not None:
                raise InvalidArgumentError(
                    "Got a chunk_size and windows: windows say of each key how many steps there are."
                )
            before, after = self._pads(None)
            return WindowRequest(self.windows, before, after, self.sampling_mode, **drops)
        if length is None:
            raise InvalidArgumentError("Give chunk_size, the steps of a chunk, or windows.")
        if self.sampling_mode == "boundary" and length < 2:
            raise InvalidArgumentError(
                f"Got chunk_size {length}; a chunk with a change of segment has at least 2 steps."
            )
        if not self.strict_length:
            return ShortRequest(length, stride=self.stride)
        if not self._padded:
            offsets = OffsetRange((length - 1) * self.stride + 1, **drops)
            return ChunkRequest(length, self.sampling_mode, stride=self.stride, offsets=offsets)
        before, after = (min(n or 0, length - 1) if not fixed else n or 0 for n in self._pads(length))
        if max(before, after) >= length:
            raise InvalidArgumentError(
                f"Got pad_before={before} and pad_after={after} with chunk_size {length}: each can be at most "
                f"{length - 1}, so that a chunk has a real step."
            )
        if self.stride > 1 and before + after >= length:
            raise InvalidArgumentError(
                f"Got stride={self.stride} with chunks of {length} steps that reach beyond both edges by {before} and "
                f"{after}: there would be chunks without a real step. Let pad_before + pad_after be at most "
                f"{length - 1}."
            )
        return PaddedRequest(length, before, after, self.sampling_mode, stride=self.stride, **drops)

    def _pads(self, length: int | None) -> tuple[int | None, int | None]:
        """Return by how many steps a chunk may reach beyond each edge; None: any number, without a ``length``."""
        most = None if length is None else length - 1
        before = most if self.pad in ("before", "both") else self.pad_before or 0
        after = most if self.pad in ("after", "both") else self.pad_after or 0
        return before, after
