"""The exception types of the library.

Each type derives from :class:`EmbodiChainRLError`, so that a single ``except`` catches every error of this library.
Each also derives from the builtin exception that matches it (``ValueError``, ``TimeoutError``, ...), so that code
written without this library in mind handles it correctly. A message states what was received, what is required and
what to do.
"""

from __future__ import annotations

__all__ = [
    "ActionMismatchError",
    "ArgumentTypeError",
    "BufferFileError",
    "BufferInUseError",
    "BufferMemoryError",
    "BufferNotFoundError",
    "CheckpointError",
    "CheckpointWriteError",
    "ChunkShapeError",
    "ChunkTooLongError",
    "ClusterConnectionError",
    "ClusterResourcesError",
    "CodecError",
    "ConfigError",
    "ConfigFileNotFoundError",
    "DataTimeoutError",
    "DataUnavailableError",
    "DatasetReadError",
    "DatasetWriteError",
    "DiskFullError",
    "EmbodiChainRLError",
    "EmptyBufferError",
    "EngineStateError",
    "EngineTimeoutError",
    "EnvOutputError",
    "EnvProbeError",
    "EnvProbeTimeoutError",
    "GenerationFailedError",
    "InvalidArgumentError",
    "LedgerLockTimeoutError",
    "MissingPackageError",
    "NativeKernelsError",
    "NothingToDrawError",
    "OwnerGoneError",
    "PendingStepsError",
    "PinLimitError",
    "RateLimitTimeoutError",
    "ReadOnlyBufferError",
    "RemoteError",
    "ResourceShortageError",
    "SchemaMismatchError",
    "SharingError",
    "StagingTimeoutError",
    "StateMismatchError",
    "StepOrderError",
    "TextTableFullError",
    "TooManyWritersError",
    "TrajectoryEvictedError",
    "TrajectoryIndexError",
    "TrajectoryTooLongError",
    "TrajectoryValueError",
    "UnknownTextError",
    "UnsupportedOperationError",
    "UploadError",
    "WorkerDiedError",
    "WorkerHungError",
]


class EmbodiChainRLError(Exception):
    """Base class of all errors of this library. It is never raised directly."""


class InvalidArgumentError(EmbodiChainRLError, ValueError):
    """Raised when an argument of a constructor or a call is invalid."""


class ArgumentTypeError(InvalidArgumentError, TypeError):
    """Raised when an argument has a type that no value of it may have."""


class CodecError(EmbodiChainRLError, ValueError):
    """Raised when a frame can't be encoded, or decoded to a frame of the stored shape and dtype."""


class ConfigError(InvalidArgumentError):
    """Raised when a configuration has an unknown key or an invalid field. The message names the field."""


class SchemaMismatchError(EmbodiChainRLError, ValueError):
    """Raised when the keys, shapes, dtypes or devices of data differ from those of the arena."""


class StepOrderError(SchemaMismatchError):
    """Raised when rows that should be consecutive steps of one environment do not follow one another."""


class TrajectoryValueError(EmbodiChainRLError, ValueError):
    """Raised when a per-trajectory value is not the same at each step of the trajectory."""


class TextTableFullError(EmbodiChainRLError, MemoryError):
    """Raised when a text table has no room for a new string."""


class UnknownTextError(EmbodiChainRLError, LookupError):
    """Raised when a text id is looked up that the table has never assigned."""


class TrajectoryTooLongError(EmbodiChainRLError, ValueError):
    """Raised when one trajectory has more steps than the whole buffer can hold."""


class PendingStepsError(EmbodiChainRLError, RuntimeError):
    """Raised when unfinished trajectories accumulate in a writer because their ``done`` never arrives."""


class PinLimitError(EmbodiChainRLError, RuntimeError):
    """Raised when too much would be pinned, or when pinned trajectories leave no room for one that is written."""


class DataUnavailableError(EmbodiChainRLError, RuntimeError):
    """Base class of the errors of a sample that can succeed later, when other trajectories have been written."""


class EmptyBufferError(DataUnavailableError):
    """Raised when a buffer is sampled that holds no trajectory yet."""


class DataTimeoutError(DataUnavailableError, TimeoutError):
    """Raised when a dataset has waited for data in vain for the time that its argument ``wait`` allows."""


class NothingToDrawError(DataUnavailableError):
    """Raised when no live trajectory has what a sample requires, such as a segment boundary."""


class ChunkShapeError(EmbodiChainRLError, RuntimeError):
    """Raised when a chunk source returns a number or a length of chunks that differs from the request."""


class ChunkTooLongError(DataUnavailableError, ValueError):
    """Raised when every live trajectory is shorter than the requested chunk."""


class TrajectoryEvictedError(EmbodiChainRLError, RuntimeError):
    """Raised when the requested trajectories were evicted before they could be read."""


class MissingKeyError(EmbodiChainRLError, KeyError):
    """A storage was asked for a key that its steps do not have."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows the repr


class TrajectoryIndexError(EmbodiChainRLError, IndexError):
    """Raised when a trajectory index is out of range."""


class CheckpointError(EmbodiChainRLError, ValueError):
    """Raised when a checkpoint is damaged or does not belong to this storage."""


class CheckpointWriteError(EmbodiChainRLError, OSError):
    """Raised when a checkpoint can't be written completely, for instance because the disk is full."""


class DatasetReadError(EmbodiChainRLError, ValueError):
    """Raised when a dataset of another library is damaged, or has what a buffer can't take."""


class DatasetWriteError(EmbodiChainRLError, OSError):
    """Raised when a dataset of another library can't be written, for instance because of its file system."""


class MissingPackageError(EmbodiChainRLError, ImportError):
    """Raised when an optional package is not installed. The message has the command that installs it."""


class StateMismatchError(EmbodiChainRLError, ValueError):
    """Raised when a state loaded into a dataset or a sampler is damaged or does not belong to it."""


class TooManyWritersError(EmbodiChainRLError, RuntimeError):
    """Raised when more trajectories are written at the same time than the ledger has slots."""


class LedgerLockTimeoutError(EmbodiChainRLError, TimeoutError):
    """Raised when a process that is alive but stopped holds the ledger's lock for too long."""


class RateLimitTimeoutError(DataUnavailableError, TimeoutError):
    """Raised when the rate limiter blocks a sample for too long because too few trajectories are inserted."""


class BufferMemoryError(EmbodiChainRLError, MemoryError):
    """Raised when a buffer would not fit into the free memory of the machine or of its cgroup."""


class BufferFileError(EmbodiChainRLError, ValueError):
    """Raised when a directory is no buffer, is damaged, is of another version, or has other limits than requested."""


class BufferNotFoundError(BufferFileError, FileNotFoundError):
    """Raised when there is no buffer at the given path."""


class BufferInUseError(BufferFileError):
    """Raised when a buffer is open on another machine, or in another pid namespace."""


class DiskFullError(EmbodiChainRLError, OSError):
    """Raised when a buffer in a file needs more room than the disk has left. Nothing that is stored is lost."""


class ReadOnlyBufferError(EmbodiChainRLError, PermissionError):
    """Raised when a buffer that was opened with ``mode="r"`` is to be changed."""


class SharingError(EmbodiChainRLError, RuntimeError):
    """Raised when a buffer can't be shared with the process or the device to which it is passed."""


class ResourceShortageError(EmbodiChainRLError, OSError):
    """Raised when a process, a thread, a lock or shared memory can't be created because a resource is short.

    The message names the resource and how its limit is raised. ``errno`` is that of the original error.
    """


class StagingTimeoutError(EmbodiChainRLError, TimeoutError):
    """Raised when the staging ring stays full, or an upload to a device does not finish, within the timeout."""


class OwnerGoneError(EmbodiChainRLError, RuntimeError):
    """Raised when the process that owns a buffer on a device has ended or has closed the buffer."""


class UploadError(EmbodiChainRLError, RuntimeError):
    """Raised by every further call after an upload to a device has failed. The first error is its cause."""


class UnsupportedOperationError(EmbodiChainRLError, NotImplementedError):
    """Raised when a TorchRL operation does not apply to whole trajectories. The message says what to call instead."""


class NativeKernelsError(EmbodiChainRLError, ImportError):
    """Raised when compiled kernels are required (``EMBODICHAIN_RL_NATIVE=1``), but none can be loaded."""


class ActionMismatchError(EmbodiChainRLError, ValueError):
    """Raised when an action of a policy or a demonstration does not match the environment's action spec."""


class ConfigFileNotFoundError(ConfigError, FileNotFoundError):
    """Raised when there is no configuration file at the given path."""


class EnvOutputError(EmbodiChainRLError, ValueError):
    """Raised when the output of an environment violates Gymnasium's interface or its own spaces."""


class EnvProbeError(EmbodiChainRLError, RuntimeError):
    """Raised when the probe process can't build or step an environment. A note holds the traceback of that process."""


class EnvProbeTimeoutError(EnvProbeError, TimeoutError):
    """Raised when building an environment and stepping it once exceeds the timeout of the probe."""


class GenerationFailedError(EmbodiChainRLError, RuntimeError):
    """Raised when an environment fails too many times in a row to produce an accepted trajectory."""


class RemoteError(EmbodiChainRLError, RuntimeError):
    """Raised instead of another process's exception whose class can't be imported or re-created in this process."""


class EngineStateError(EmbodiChainRLError, RuntimeError):
    """Raised when an engine does not support a call in its current state or in this process."""


class EngineTimeoutError(DataUnavailableError, TimeoutError):
    """Raised when an engine's workers have not filled the buffer within the timeout."""


class WorkerDiedError(EmbodiChainRLError, RuntimeError):
    """Raised when a worker process exited or was killed without reporting an exception."""


class ClusterConnectionError(EmbodiChainRLError, ConnectionError):
    """Raised when a cluster does not answer at its address, or is lost. The message names the address."""


class ClusterResourcesError(EmbodiChainRLError, RuntimeError):
    """Raised when a cluster has not the resources that its workers need. The message names both."""


class WorkerHungError(EmbodiChainRLError, TimeoutError):
    """Raised when a worker has sent no heartbeat within its timeout."""
