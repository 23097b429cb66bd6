"""Engines that are saved, and go on in another process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tensordict import TensorDict

from embodichain_rl.engine.checkpoint import SavedEngine, read_checkpoint, write_checkpoint
from embodichain_rl.engine.config import OnlineDataEngineCfg
from embodichain_rl.engine.reading import EngineReader
from embodichain_rl.engine.state import Generations
from embodichain_rl.errors import CheckpointError, InvalidArgumentError, StateMismatchError
from embodichain_rl.shared import write_durably

if TYPE_CHECKING:
    from embodichain_rl.engine.workers import Plan

__all__ = ["SavingEngine"]

SESSIONS = "engine.json"
"""A file in the directory of a buffer: how many engines have filled it."""


class SavingEngine(EngineReader):
    """What :class:`~embodichain_rl.OnlineDataEngine` does to go on after its process has ended."""

    _plan: Plan | None
    _restored: SavedEngine | None = None

    def save(self, path: str | os.PathLike[str], **states: Any) -> None:
        """Save the engine to the directory ``path``; workers and samplers go on meanwhile.

        Saved are the trajectories, with their ids and pins; the counts of the rate limiter; the generations; the
        weights of the policy and their version; and the seeds of the workers. An earlier checkpoint there is replaced
        when the new one is whole: if this is broken off, it is kept.

        A buffer with ``buffer_path`` is synced too.

        Args:
            path: the directory.
            states: what else belongs to the training, by name: objects with ``state_dict()``, such as models,
                optimizers, an ``OnlineDataset`` or a ``StatefulDataLoader``; or tensors, numbers, text, and dicts and
                lists of these. They are in :attr:`saved_states` of the engine that is loaded.

        Raises:
            EngineStateError: if this process is not the owner of the engine.
            CheckpointWriteError: if the directory can't be written to, or the disk is full.
            InvalidArgumentError: if a state can't be stored.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from embodichain_rl import OnlineDataEngine
            >>> cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "Pendulum-v1"}, seed=0)
            >>> with TemporaryDirectory() as path:
            ...     OnlineDataEngine(cfg).save(path, step=7)
            ...     engine = OnlineDataEngine.load(path)
            >>> engine.saved_states["step"], engine.cfg.buffer_size
            (7, 2)
        """
        self._check_owner("save")
        named = {name: state.state_dict() if hasattr(state, "state_dict") else state for name, state in states.items()}
        plan, restored = self._plan, self._restored
        weights = None if restored is None else restored.weights
        if plan is not None and plan.policy is not None:
            with plan.policy_lock:
                weights = plan.weights().clone().to_dict()
        storage, limiter = self.replay_buffer.storage, self.rate_limiter
        if storage.path is not None:
            storage.sync()
        counts = {
            "policy_version": self._channel.policy_version,
            "entropy": None if plan is None else str(plan.entropy),
            "session": self._session if plan is None else plan.session,
            "started": plan is not None or (restored is not None and restored.engine["started"]),
            "generations": Generations(self._channel).state(),
            "limiter": None if limiter is None else limiter.state_dict(),
            "buffer": storage.ledger.holds.identity,
            "next_id": storage.ledger.next_id,
        }
        if plan is None and restored is not None:
            counts["entropy"] = restored.engine["entropy"]
        write_checkpoint(Path(path).absolute(), self.replay_buffer, self.cfg, counts, weights, named)

    @classmethod
    def load(cls, path: str | os.PathLike[str], cfg: OnlineDataEngineCfg | None = None, **changes: Any) -> Self:
        """Return an engine that goes on where one that was saved to ``path`` was. It is not started.

        ``start()`` fills only what is missing. The workers begin new episodes, from streams of random numbers that
        follow those of the engine that was saved: no episode is collected twice, and a fixed seed gives the same
        episodes whenever the same checkpoint is loaded.

        With ``buffer_path``, the buffer there is used as it is if it is the one that was saved, since it has all that
        was published after that, too. If there is none, the trajectories of the checkpoint are written to a new one.

        Args:
            path: the directory.
            cfg: the configuration. None: the one that was saved, which is possible unless it has functions or modules,
                such as a policy; give these as ``changes`` then.
            changes: fields of the configuration to change, such as ``num_workers``.

        Raises:
            CheckpointError: if there is no whole checkpoint, or the buffer at ``buffer_path`` is another one.
            StateMismatchError: if the engine was saved with another ``buffer_size``, ``max_episode_steps``,
                ``compact``, ``refill_policy``, ``seed``, environment id, or without pacing.
            ConfigError: if fields are missing.
            SchemaMismatchError: by ``start()``, if the environment has other keys than the trajectories.
        """
        if cfg is not None and not isinstance(cfg, OnlineDataEngineCfg):
            raise InvalidArgumentError(f"Got cfg of type {type(cfg).__name__}; it must be an OnlineDataEngineCfg.")
        saved = read_checkpoint(Path(path).absolute())
        given = saved.cfg(cfg, changes)
        engine = cls(given)  # type: ignore[call-arg, arg-type]
        engine._restore(saved, given)
        return engine

    @property
    def saved_states(self) -> Mapping[str, Any]:
        """What was passed to :meth:`save` besides, of an engine that was loaded; else empty.

        Of objects with ``state_dict()`` it is what that returned: pass it to their ``load_state_dict()``.
        """
        return {} if self._restored is None else self._restored.states

    def _restore(self, saved: SavedEngine, cfg: OnlineDataEngineCfg) -> None:
        storage = self.replay_buffer.storage
        ledger = storage.ledger
        if ledger.next_id and ledger.holds.identity != saved.engine["buffer"]:
            raise CheckpointError(
                f"The buffer at {storage.path} is not the one that was saved, but has trajectories. Give the "
                "buffer_path of a new directory, to which those of the checkpoint are written; or start the engine "
                "without load(), to go on with those that are there."
            )
        is_new = not ledger.next_id
        if is_new:
            self.replay_buffer.loads(saved.buffer)
        self._restored = saved
        self._session = int(saved.engine["session"]) + int(saved.engine["started"])
        self._channel.policy_version = int(saved.engine["policy_version"])
        Generations(self._channel).restore(saved.engine["generations"])
        limiter = self.rate_limiter
        if limiter is not None:
            limiter.load_state_dict(saved.engine["limiter"])
            limiter.pause()
            ratio = cfg.refill_threshold
            if ratio is not None and ratio != saved.fields.get("refill_threshold"):
                limiter.samples_per_insert = ratio
            limiter.count_insert(max(0, ledger.next_id - int(saved.engine["next_id"])))

    _session = 0

    def _go_on(self, plan: Plan) -> None:
        """Let the workers of a plan begin where those of the saved engine ended, or those that filled the same file."""
        path, restored = self.replay_buffer.storage.path, self._restored
        if restored is not None and restored.engine["entropy"] is not None:
            plan.entropy = int(restored.engine["entropy"])
        plan.session = self._session
        if path is not None:
            plan.session = max(plan.session, _sessions(path))
            write_durably(path / SESSIONS, json.dumps({"sessions": plan.session + 1}).encode())

    def _restore_policy(self, plan: Plan) -> None:
        """Give a plan the weights of the saved engine."""
        weights = None if self._restored is None else self._restored.weights
        if weights is None:
            return
        if plan.policy is None:
            raise StateMismatchError(
                "The checkpoint has the weights of a policy, but the policy of the configuration has none. Give the "
                "one of the engine that was saved."
            )
        try:
            plan.load_weights(TensorDict(weights))
        except InvalidArgumentError as error:
            raise StateMismatchError(f"The policy is not the one that was saved. {error}") from None

    def _check_owner(self, what: str) -> None:
        raise NotImplementedError

    @property
    def cfg(self) -> OnlineDataEngineCfg:
        """The configuration."""
        raise NotImplementedError


def _sessions(path: Path) -> int:
    """Return how many engines have filled the buffer at ``path``."""
    try:
        return int(json.loads((path / SESSIONS).read_text())["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
