"""Probe of an environment: a short-lived process builds it, takes a step and returns a description of the data.

A simulator may allow only one instance per process, may keep a GPU allocated, or may crash the process. So it is never
loaded into the caller's process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, Literal

import cloudpickle  # type: ignore[import-untyped]
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor
from torchrl.collectors import Collector
from torchrl.data import Composite
from torchrl.envs import EnvBase

from embodichain_rl._checks import checked_float
from embodichain_rl.engine.demonstrations import find_planner, offers_demonstrations, segment_texts
from embodichain_rl.engine.environments import DEMO, EnvMaker, Policy, make_policy
from embodichain_rl.engine.processes import (
    ChildProcess,
    end_process_group,
    leave_foreground,
    pack_exception,
    starting_processes,
    unpack_exception,
)
from embodichain_rl.errors import ConfigError, EnvProbeError, EnvProbeTimeoutError
from embodichain_rl.replay.schema import as_non_tensor, text_array
from embodichain_rl.shared import Deadline, main_is_importable, naming_shortage, stopped_note

__all__ = ["PROBE_NAME", "EnvProbe", "probe_env"]

PROBE_NAME = "embodichain-rl-env-probe"
"""The name of the probe process."""

_CLOSING_GRACE = 5.0  # seconds that the probe process has to close its environment after it has sent the result
_TERMINATION_GRACE = 2.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class EnvProbe:
    """A description of the data that a worker with this environment writes.

    Args:
        example: one step, batch size ``[]``, with zeros and empty text, on the CPU. It has every key that a collector
            writes, including ``("collector", "traj_ids")``.
        batch_size: the batch size of the environment: ``[]``, or ``[N]`` for a batch of N environments.
        observation_spec: the spec of the observations, including the batch size.
        action_spec: the spec of the actions, including the batch size.
        seconds: time to build the environment and take a step, in seconds, without the start of the process.
        demonstrates: whether a worker rolls out demonstrations.
    """

    example: TensorDict
    batch_size: torch.Size
    observation_spec: Composite
    action_spec: Composite
    seconds: float
    demonstrates: bool = False

    @property
    def reports_success(self) -> bool:
        """Whether the steps have the key ``("next", "success")``."""
        return ("next", "success") in self.example.keys(True, True)


def probe_env(
    env_maker: Callable[[], EnvBase],
    *,
    policy: Policy | str = None,
    policy_factory: Callable[[], Policy] | None = None,
    state_key: NestedKey = "observation",
    timeout: float = 300.0,
    start_method: Literal["spawn", "forkserver"] = "spawn",
) -> EnvProbe:
    """Build an environment in a separate process, take a step in it, and return a description of the data.

    The step is taken by a TorchRL collector with the policy that the workers will use, so the description includes the
    keys that the policy writes. Two random steps before it check that the environment does not reuse the memory of a
    step. The process and all processes that it started have ended when this function returns or raises. A script that
    calls it needs the usual ``if __name__ == "__main__":``.

    Args:
        env_maker: an :class:`~embodichain_rl.engine.environments.EnvMaker` or any function without arguments that makes
            the environment. ``cloudpickle`` must be able to pickle it.
        policy: the policy, see :func:`~embodichain_rl.engine.environments.make_policy`; ``"demo"`` for the
            demonstrations of the environment; or None for demonstrations if the environment offers them, else random
            actions. Demonstrations are not planned here: a random step is taken, and their keys are added.
        policy_factory: a function that makes the policy in the probe process, instead of ``policy``.
        state_key: the observation that a plain function as ``policy`` receives.
        timeout: the timeout in seconds, including the start of the process.
        start_method: how the process is started: ``"spawn"``, or ``"forkserver"``, which is faster if the server has
            already imported the needed modules. In both cases it inherits nothing from this process.

    Raises:
        EnvProbeError: building or stepping the environment raised an exception (it is the cause, and a note holds its
            traceback); the process ended without a result; or the environment writes an entry that is neither a tensor
            of fixed shape nor text.
        EnvProbeTimeoutError: the timeout has passed. The message names the step that was running.
        InvalidArgumentError: ``timeout`` is not a finite number of at least 0.

    Example:
        >>> from embodichain_rl.engine.environments import EnvMaker
        >>> if __name__ == "__main__":
        ...     probe = probe_env(EnvMaker({"id": "Pendulum-v1"}))
        ...     print(probe.example["observation"].shape)  # doctest: +SKIP
        torch.Size([3])
    """
    timeout = checked_float("timeout", timeout, minimum=0.0)
    if policy is not None and policy_factory is not None:
        raise ConfigError("Give either policy or policy_factory; got both.")
    context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
    if start_method == "forkserver":
        context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    job = cloudpickle.dumps((env_maker, policy, policy_factory, state_key))
    mark = secrets.token_hex(8)
    process = context.Process(target=_probe_process, args=(sender, job, mark), name=PROBE_NAME)
    grace, child = 0.0, None
    try:
        with naming_shortage("The start of the probe's process"), starting_processes():
            process.start()
        child = ChildProcess(process, mark)
        sender.close()
        probe = _answer(child, receiver, timeout, _name(env_maker))
        grace = _CLOSING_GRACE
        return probe
    finally:
        receiver.close()
        if child is not None:
            child.end(grace, _TERMINATION_GRACE)
            child.close()


def _name(env_maker: Callable[[], EnvBase]) -> str:
    return env_maker.name if isinstance(env_maker, EnvMaker) else str(getattr(env_maker, "__qualname__", env_maker))


def _answer(child: ChildProcess, receiver: Connection, timeout: float, name: str) -> EnvProbe:
    doing, deadline = "starting its process", Deadline(timeout)
    while True:
        wait([receiver, *child.waitables()], deadline.slice())
        if receiver.poll():
            try:
                kind, content = pickle.loads(receiver.recv_bytes())
            except EOFError:
                child.wait(Deadline(_TERMINATION_GRACE))
                raise _died(child, doing, name) from None
            if kind == "doing":
                doing = content
            elif kind == "probe":
                return content
            else:
                cause = unpack_exception(content, where="the probe's process")
                error = EnvProbeError(f"{name}: {doing} failed with {type(cause).__qualname__}: {cause}")
                error.add_note(cause.__notes__.pop())  # moved, so that it is printed only once
                raise error from cause
        elif not child.alive():
            raise _died(child, doing, name)
        elif deadline.passed():
            remedy = " Raise the timeout if the environment is that slow; otherwise find out where it blocks."
            raise EnvProbeTimeoutError(
                f"{name}: {doing} was not done {timeout:g} s after the start of the probe."
                f"{stopped_note(child.pid) or remedy}"
            )


_GUARD = " If the process could not even start, call this under `if __name__ == '__main__':`."


def _died(child: ChildProcess, doing: str, name: str) -> EnvProbeError:
    code = None if child.alive() else child.exit_code()
    with_code = "an unknown exit code" if code is None else f"exit code {code}"
    return EnvProbeError(
        f"{name}: the probe's process ended with {with_code} while {doing}; its output on stderr "
        f"may say why. A negative code is a signal.{_GUARD if main_is_importable() else ''}"
    )


def _probe_process(sender: Connection, job: bytes, mark: str) -> None:
    leave_foreground(mark)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The stack is unwound after the result is sent, since closing a simulator may take long or fail.
    with contextlib.ExitStack() as closing:
        try:
            answer: tuple[str, Any] = ("probe", _describe(*cloudpickle.loads(job), sender=sender, closing=closing))
        except BaseException as error:
            answer = ("error", pack_exception(error))
        sender.send_bytes(pickle.dumps(answer))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    end_process_group()


def _describe(
    env_maker: Callable[[], EnvBase],
    policy: Policy | str,
    policy_factory: Callable[[], Policy] | None,
    state_key: NestedKey,
    *,
    sender: Connection,
    closing: contextlib.ExitStack,
) -> EnvProbe:
    demonstrates = isinstance(policy, str) and policy == DEMO
    sender.send_bytes(pickle.dumps(("doing", "building the environment")))
    start = time.perf_counter()
    undecided = policy is None and policy_factory is None
    single = env_maker.single if isinstance(env_maker, EnvMaker) and (demonstrates or undecided) else env_maker
    env = single()
    closing.callback(env.close, raise_if_closed=False)
    if undecided:
        demonstrates = offers_demonstrations(env)
        if not demonstrates and isinstance(env_maker, EnvMaker) and env_maker.is_batch:
            env.close()  # some simulators allow one instance per process
            env = env_maker()
            closing.callback(env.close, raise_if_closed=False)
    if demonstrates:
        find_planner(env)
        actor = make_policy(None, env)
    else:
        actor = make_policy(policy if policy_factory is None else policy_factory(), env, state_key=state_key)

    sender.send_bytes(pickle.dumps(("doing", "acting in the environment")))
    _check_memory(env)
    # Without further transforms that TorchRL would derive from the policy, as in the workers.
    collector = Collector(
        env,
        actor,
        frames_per_batch=env.numel(),
        total_frames=env.numel(),
        auto_register_policy_transforms=False,
    )
    closing.callback(collector.shutdown)
    step = next(iter(collector)).reshape(-1)[0]
    seconds = time.perf_counter() - start
    if demonstrates:
        step["segment_id"] = step["segment_step"] = torch.tensor(0)
        for key in segment_texts(env):
            step[key] = as_non_tensor("")
    texts = _check_storable(step, env)
    example = step.exclude(*texts).to("cpu").apply(torch.zeros_like)
    for key in texts:
        example.set(key, as_non_tensor(""))
    return EnvProbe(
        example=example,
        batch_size=env.batch_size,
        observation_spec=env.full_observation_spec.to("cpu"),
        action_spec=env.full_action_spec.to("cpu"),
        seconds=seconds,
        demonstrates=demonstrates,
    )


def _check_memory(env: EnvBase) -> None:
    """Raise ``ConfigError`` if the environment overwrites earlier steps, since TorchRL stacks the steps later."""
    first = env.rand_step(env.reset())
    before = first["next"].clone()
    env.rand_step(env.step_mdp(first) if not first["next", "done"].any() else env.reset())
    for key, old in before.items(True, True):
        new = first["next"][key]
        if isinstance(old, torch.Tensor) and bool(((old != new) & (old == old)).any()):
            raise ConfigError(
                f"The environment writes {key!r} of every step into the same memory, so a step that was collected "
                "changes with the next one. Return a copy (`.clone()`, or for an array `.copy()`) of the observation."
            )


def _check_storable(step: TensorDictBase, env: EnvBase) -> list[NestedKey]:
    """Return the keys of text. Raise ``ConfigError`` if an entry is neither a tensor of fixed shape nor text."""
    others = {key: text_array(value) for key, value in step.items(True, True, is_leaf_nontensor)}
    for key in step.keys(True, True):
        del others[key]
    unfit = [key for key, texts in others.items() if texts is None]
    unfit += [key for key, spec in env.full_observation_spec.items(True, True) if -1 in spec.shape]
    if unfit:
        raise ConfigError(
            f"The environment writes {unfit}, which are neither tensors of fixed shape nor text. Remove them with "
            "torchrl.envs.ExcludeTransform in transforms, or convert them to tensors."
        )
    return list(others)
