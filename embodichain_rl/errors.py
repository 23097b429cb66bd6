"""Every error that the library raises on purpose.

Each type derives from :class:`EmbodiChainRLError`, so that one ``except`` catches whatever this library refuses, and
from the builtin that a caller would expect, so that code which knows nothing of this library still does the right
thing. A message says what was got, what is needed and what to do.
"""

from __future__ import annotations

__all__ = [
    "ActionMismatchError",
    "BufferMemoryError",
    "CheckpointError",
    "CheckpointWriteError",
    "ChunkShapeError",
    "ChunkTooLongError",
    "ConfigError",
    "ConfigFileNotFoundError",
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
    "NothingToDrawError",
    "OwnerGoneError",
    "PendingStepsError",
    "RateLimitTimeoutError",
    "RemoteError",
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
    """Base of all errors of this library; never raised itself."""


class InvalidArgumentError(EmbodiChainRLError, ValueError):
    """Raised when an argument of a constructor or a call is not one that can work."""


class ConfigError(InvalidArgumentError):
    """Raised when a configuration has an unknown key or a field that can't work; the message names the field."""


class SchemaMismatchError(EmbodiChainRLError, ValueError):
    """Raised when data has other keys, shapes, dtypes or devices than the arena it should be written to."""


class StepOrderError(SchemaMismatchError):
    """Raised when rows that should be consecutive steps of one environment do not follow one another."""


class TrajectoryValueError(EmbodiChainRLError, ValueError):
    """Raised when what should belong to a whole trajectory is not the same at each of its steps."""


class TextTableFullError(EmbodiChainRLError, MemoryError):
    """Raised when a new string has no place in a table of texts."""


class UnknownTextError(EmbodiChainRLError, LookupError):
    """Raised when the text of an id is asked for that the table has never given out."""


class TrajectoryTooLongError(EmbodiChainRLError, ValueError):
    """Raised when one trajectory has more steps than the whole buffer may hold."""


class PendingStepsError(EmbodiChainRLError, RuntimeError):
    """Raised when unfinished trajectories pile up in a writer because their ``done`` never comes."""


class EmptyBufferError(EmbodiChainRLError, RuntimeError):
    """Raised when a sample is asked of a buffer that holds no trajectory yet."""


class NothingToDrawError(EmbodiChainRLError, RuntimeError):
    """Raised when a sample asks for what no live trajectory has, such as a change of segment."""


class ChunkShapeError(EmbodiChainRLError, RuntimeError):
    """Raised when a source of chunks hands out another number of chunks, or other lengths, than it was asked for."""


class ChunkTooLongError(EmbodiChainRLError, ValueError):
    """Raised when no live trajectory has as many steps as the chunk that is asked for."""


class TrajectoryEvictedError(EmbodiChainRLError, RuntimeError):
    """Raised when the trajectories that were asked for were evicted before they could be read."""


class TrajectoryIndexError(EmbodiChainRLError, IndexError):
    """Raised when a trajectory is asked for by a position at which there is none."""


class CheckpointError(EmbodiChainRLError, ValueError):
    """Raised when a checkpoint is damaged, or is not one of this storage."""


class CheckpointWriteError(EmbodiChainRLError, OSError):
    """Raised when a checkpoint can't be written to its end, for instance because the disk is full."""


class StateMismatchError(EmbodiChainRLError, ValueError):
    """Raised when a dataset or a sampler is given a state that is damaged, or not one of its own."""


class TooManyWritersError(EmbodiChainRLError, RuntimeError):
    """Raised when more trajectories are being written at the same moment than the ledger has slots for."""


class LedgerLockTimeoutError(EmbodiChainRLError, TimeoutError):
    """Raised when the ledger's lock stays taken by a process that is alive but does not go on."""


class RateLimitTimeoutError(EmbodiChainRLError, TimeoutError):
    """Raised when a sample may not go ahead in time because producers insert too little for what is drawn."""


class BufferMemoryError(EmbodiChainRLError, MemoryError):
    """Raised when a buffer would not fit into what the machine, or its cgroup, has left."""


class SharingError(EmbodiChainRLError, RuntimeError):
    """Raised when a buffer is taken to a place, process or device that it can't be shared with."""


class StagingTimeoutError(EmbodiChainRLError, TimeoutError):
    """Raised when a trajectory finds no room on its way to a device, or is not there, within the time it was given."""


class OwnerGoneError(EmbodiChainRLError, RuntimeError):
    """Raised when the process that keeps a buffer on a device has ended, or has closed it."""


class UploadError(EmbodiChainRLError, RuntimeError):
    """Raised, time and again, when uploading to a device has failed; the first error is its cause."""


class UnsupportedOperationError(EmbodiChainRLError, NotImplementedError):
    """Raised when an operation of TorchRL has no meaning for whole trajectories; the message says what to call."""


class ActionMismatchError(EmbodiChainRLError, ValueError):
    """Raised when a policy or a demonstration gives an action that does not fit the environment's action spec."""


class ConfigFileNotFoundError(ConfigError, FileNotFoundError):
    """Raised when there is no configuration file at the given path."""


class EnvOutputError(EmbodiChainRLError, ValueError):
    """Raised when an environment returns something other than Gymnasium's interface and its own spaces say."""


class EnvProbeError(EmbodiChainRLError, RuntimeError):
    """Raised when an environment can't be built or stepped in the probe's process; a note holds the traceback there."""


class EnvProbeTimeoutError(EnvProbeError, TimeoutError):
    """Raised when an environment is not built and stepped once within the time that the probe was given."""


class GenerationFailedError(EmbodiChainRLError, RuntimeError):
    """Raised when one environment fails too many times in a row to give a trajectory that is kept."""


class RemoteError(EmbodiChainRLError, RuntimeError):
    """Raised in place of another process's exception that can't be imported, or made anew, here."""


class EngineStateError(EmbodiChainRLError, RuntimeError):
    """Raised when an engine is asked for what it can't do in its present state, or in this process."""


class EngineTimeoutError(EmbodiChainRLError, TimeoutError):
    """Raised when an engine's workers have not filled the buffer within the time that they were given."""


class WorkerDiedError(EmbodiChainRLError, RuntimeError):
    """Raised when a worker's process ended by itself, or was killed, and left no exception that says why."""


class WorkerHungError(EmbodiChainRLError, TimeoutError):
    """Raised when a worker gave no sign of life for longer than it may."""
