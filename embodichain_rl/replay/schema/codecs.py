"""Codecs of images: how the frames of a field are encoded, and decoded into the memory of a batch."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from embodichain_rl.errors import CodecError, InvalidArgumentError, MissingPackageError, SchemaMismatchError

__all__ = [
    "Codec",
    "JpegCodec",
    "PngCodec",
    "RawCodec",
    "checked_codec",
    "codec_from_json",
    "codec_to_json",
    "identity_of",
    "is_built_in",
    "least_bytes",
]

CHANNELS = (1, 3)
"""Numbers of channels of an image that a JPEG file can have here."""


@runtime_checkable
class Codec(Protocol):
    """What encodes the frames of a field, and decodes them: any object with these two methods that can be pickled.

    Both are called from several threads at the same time.
    """

    def encode(self, frame: np.ndarray) -> bytes:
        """Return a frame, contiguous and of the shape of a step, as bytes. Equal frames should give equal bytes."""

    def decode(self, data: bytes, out: np.ndarray) -> Any:
        """Decode a frame into ``out``, contiguous and of the shape of a step; or return it as another array."""


@dataclass(frozen=True)
class PngCodec:
    """PNG: bit-equal, about a third of the size of a rendered frame; see ``compress`` of :class:`TrajectoryStorage`.

    Frames are ``uint8`` or ``uint16``, of any shape of two or more dimensions. Needs the extra ``images``
    (``imagecodecs``).

    Args:
        level: zlib's level, 1 (fastest) to 9 (smallest).

    Raises:
        InvalidArgumentError: for another level.
    """

    level: int = 1
    name: ClassVar[str] = "png"

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or self.level not in range(1, 10):
            raise InvalidArgumentError(f"Got level={self.level!r}; it must be an int from 1 to 9.")

    def check(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Return what is wrong with frames of this kind; None if they can be encoded."""
        if dtype not in (torch.uint8, torch.uint16) or len(shape) < 2 or 0 in shape:
            return "PNG holds frames of uint8 or uint16 with two or more dimensions, such as [height, width, channels]"
        return None

    def encode(self, frame: np.ndarray) -> bytes:
        """Return a frame as a PNG file."""
        encoded = _imagecodecs().png_encode(_as_picture(frame), level=self.level, strategy=3, filter=16)
        return bytes(encoded)

    def decode(self, data: bytes, out: np.ndarray) -> None:
        """Decode a PNG file into ``out``."""
        _imagecodecs().png_decode(data, out=_as_picture(out))


@dataclass(frozen=True)
class JpegCodec:
    """JPEG: about a twentieth of the size of a rendered frame, but not the same bits.

    Frames are ``uint8``: ``[height, width, channels]`` or ``[channels, height, width]`` with one or three channels, or
    ``[height, width]``. Needs the extra ``images`` (``simplejpeg``).

    Args:
        quality: 1 to 100.
        subsampling: of the colors: ``"420"``, or ``"444"`` for none.

    Raises:
        InvalidArgumentError: for others.
    """

    quality: int = 90
    subsampling: str = "420"
    name: ClassVar[str] = "jpeg"

    def __post_init__(self) -> None:
        if isinstance(self.quality, bool) or self.quality not in range(1, 101):
            raise InvalidArgumentError(f"Got quality={self.quality!r}; it must be an int from 1 to 100.")
        if self.subsampling not in ("444", "422", "420", "440", "411"):
            raise InvalidArgumentError(f"Got subsampling={self.subsampling!r}; it must be '420', '422' or '444'.")

    def check(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Return what is wrong with frames of this kind; None if they can be encoded."""
        color = len(shape) == 3 and (shape[-1] in CHANNELS or shape[0] in CHANNELS)
        if dtype != torch.uint8 or not (color or len(shape) == 2) or 0 in shape or max(shape) > 65_500:
            return (
                "JPEG holds frames of uint8, [height, width, channels] or [channels, height, width] with 1 or 3 "
                "channels, or [height, width]"
            )
        return None

    def encode(self, frame: np.ndarray) -> bytes:
        """Return a frame as a JPEG file."""
        picture = np.ascontiguousarray(_channels_last(frame))
        color = "RGB" if picture.shape[-1] == 3 else "GRAY"
        subsampling = self.subsampling if color == "RGB" else "Gray"
        encoded = _simplejpeg().encode_jpeg(
            picture, quality=self.quality, colorspace=color, colorsubsampling=subsampling
        )
        return bytes(encoded)

    def decode(self, data: bytes, out: np.ndarray) -> np.ndarray | None:
        """Decode a JPEG file into ``out``."""
        picture = _channels_last(out)
        color = "RGB" if picture.shape[-1] == 3 else "GRAY"
        in_place = picture.flags.c_contiguous
        decoded = _simplejpeg().decode_jpeg(data, color, buffer=picture if in_place else None)
        if decoded.shape != picture.shape:
            raise CodecError(f"A JPEG file of {decoded.shape} was stored for a frame of {picture.shape}.")
        if not in_place:
            picture[...] = decoded
        return None


@dataclass(frozen=True)
class RawCodec:
    """No encoding, for values of any shape and dtype that stay the same for several steps: each is stored once."""

    name: ClassVar[str] = "raw"

    def encode(self, frame: np.ndarray) -> bytes:
        """Return the bytes of a value."""
        return frame.tobytes()

    def decode(self, data: bytes, out: np.ndarray) -> None:
        """Copy the bytes of a value into ``out``."""
        out.reshape(-1).view(np.uint8)[...] = np.frombuffer(data, dtype=np.uint8)


BUILT_IN = PngCodec, JpegCodec, RawCodec

BY_NAME: dict[str, Any] = {"png": PngCodec, "jpeg": JpegCodec, "jpg": JpegCodec, "raw": RawCodec}


def checked_codec(key: Any, codec: Any) -> Any:
    """Return the codec that a user has given for a key: by its name, or itself.

    Raises:
        InvalidArgumentError: if it is none.
        MissingPackageError: if the library that it needs is not installed.
    """
    if isinstance(codec, str):
        if codec.lower() not in BY_NAME:
            raise InvalidArgumentError(
                f"Got compress={{{key!r}: {codec!r}}}; needed is 'png', which is bit-equal, 'jpeg', or an object with "
                "the methods encode(frame) and decode(data, out)."
            )
        codec = BY_NAME[codec.lower()]()
    if isinstance(codec, type) or not isinstance(codec, Codec):
        raise InvalidArgumentError(
            f"Got compress={{{key!r}: {codec!r}}}; a codec is 'png', 'jpeg', or an object with the methods "
            "encode(frame) and decode(data, out)."
        )
    if isinstance(codec, PngCodec):
        _imagecodecs()
    elif isinstance(codec, JpegCodec):
        _simplejpeg()
    return codec


def codec_to_json(codec: Any) -> dict[str, Any]:
    """Return a codec as JSON; of one of the user's own only that it is one."""
    if is_built_in(codec):
        return {"name": codec.name, **dataclasses.asdict(codec)}
    return {"name": "custom"}


def codec_from_json(described: Any) -> Any:
    """Return the codec for what :func:`codec_to_json` returned; :class:`UnknownCodec` for one of the user's own.

    Raises:
        ValueError, TypeError, KeyError: when it is something else.
    """
    if not isinstance(described, Mapping):
        raise TypeError(f"{described!r} is not a codec")
    options = dict(described)
    name = options.pop("name")
    return UnknownCodec() if name == "custom" else BY_NAME[name](**options)


def is_built_in(codec: Any) -> bool:
    """Return whether a codec is one of the library's, not one of the user's own, as a subclass of these is."""
    return type(codec) in BUILT_IN


def identity_of(codec: Any) -> Any:
    """Return what is equal for two codecs if they decode the same bytes to the same frame."""
    return codec if is_built_in(codec) else id(codec)


class UnknownCodec:
    """Stands for a codec of the user's that this process does not have."""

    def encode(self, frame: np.ndarray) -> bytes:
        """Raise an error."""
        raise CodecError(
            "The frames are encoded with a codec of your own, which this process does not have. Give the same "
            "compress={...} to the buffer here; 'png' and 'jpeg' are known everywhere."
        )

    def decode(self, data: bytes, out: np.ndarray) -> None:
        """Raise an error."""
        self.encode(out)


def refuse_frames(key: str, codec: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse frames that a codec can't encode.

    Raises:
        SchemaMismatchError: says what the codec holds.
    """
    check = getattr(codec, "check", None)
    reason = check(shape, dtype) if check is not None else None
    if reason is not None:
        raise SchemaMismatchError(
            f"Got {key} of {str(dtype).removeprefix('torch.')} with the shape {list(shape)} and compress={codec!r}: "
            f"{reason}. Leave the key out of compress, or convert it before writing."
        )


def least_bytes(codec: Any, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Return how many bytes a frame is expected to take at least, however plain the first frames are."""
    raw = dtype.itemsize * math.prod(shape)
    return raw / {"png": 8, "jpeg": 40, "raw": 1}.get(getattr(codec, "name", ""), 40)


def takes_out(codec: Any) -> bool:
    """Return whether ``decode`` of a codec takes the array to decode to."""
    return is_built_in(codec) or _takes_another(codec.decode)


def _takes_another(decode: Any) -> bool:
    try:
        return len(inspect.signature(decode).parameters) > 1
    except (TypeError, ValueError):
        return True


def skew_of(codec: Any) -> int:
    """Return by how many bytes the memory that a codec decodes to should begin behind a cache line.

    libjpeg-turbo writes rows that begin at a multiple of 32 bytes past the caches of the processor. That takes a
    twentieth longer, and whatever reads the frames has to fetch them from memory.
    """
    return 16 if isinstance(codec, JpegCodec) else 0


def _as_picture(frame: np.ndarray) -> np.ndarray:
    """Return a frame as one picture, ``[height, width]`` or ``[height, width, channels]``, over the same memory."""
    if frame.ndim > 2 and frame.shape[-1] in (1, 2, 3, 4):
        channels = frame.shape[-1:] if frame.shape[-1] > 1 else ()
        return frame.reshape(-1, frame.shape[-2], *channels)
    return frame.reshape(-1, frame.shape[-1])


def _channels_last(frame: np.ndarray) -> np.ndarray:
    """Return a view ``[height, width, channels]`` of a frame."""
    if frame.ndim == 2:
        return frame[..., None]
    return frame if frame.shape[-1] in CHANNELS else np.moveaxis(frame, 0, -1)


@cache
def _imagecodecs() -> Any:
    try:
        import imagecodecs
    except ImportError as error:
        raise _missing("PNG", "imagecodecs") from error
    return imagecodecs


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError as error:
        raise _missing("JPEG", "simplejpeg") from error
    return simplejpeg


def _missing(what: str, package: str) -> MissingPackageError:
    return MissingPackageError(
        f"Images kept as {what} need {package}, which can't be imported. Install it: "
        "pip install 'embodichain-rl[images]'."
    )
