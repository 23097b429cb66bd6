"""TorchRL's own tests of replay buffers, run with the classes of this library in the place of TorchRL's.

Its buffers, tensor storages and round-robin writers are replaced by those of this library where the tests import them.
TorchRL's items are single steps of no trajectory: the writer takes each for a trajectory of one step. Nothing in the
checkout is changed.

    make torchrl-tests TORCHRL=~/rl
    python examples/clients/torchrl_tests.py ~/rl --files test_composable.py -k index

A test that fails by an error of this library's own is *refused on purpose*: what it asks for is not offered, and the
error says so. All others that fail are listed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrl.data
import torchrl.data.replay_buffers.storages
import torchrl.data.replay_buffers.writers
from tensordict import TensorDictBase, is_tensor_collection

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import EmbodiChainRLError

FILES = ("test_composable.py", "test_rb_core.py", "test_query.py", "test_rb_transforms.py", "test_writers.py")


class StepWriter(TrajectoryWriter):
    """Writes each step as a trajectory of its own, as TorchRL's tests expect of their items."""

    def __init__(self, compilable: bool = False, *, track_generations: bool = False) -> None:
        super().__init__(compilable=compilable, track_generations=track_generations)

    def extend(self, data: Any) -> torch.Tensor:
        """Mark the end of every step, and write them."""
        if is_tensor_collection(data) and isinstance(data, TensorDictBase) and ("next", "done") not in data.keys(True):
            data["next", "done"] = torch.ones(*data.shape, 1, dtype=torch.bool)
        return super().extend(data)


class StepBuffer(TrajectoryReplayBuffer):
    """The buffer, with the defaults of TorchRL's."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {name: made(value) for name, value in kwargs.items()}
        kwargs.setdefault("storage", Storage(1_000))
        kwargs.setdefault("writer", StepWriter())
        kwargs.setdefault("sampler", torchrl.data.RandomSampler())
        super().__init__(**kwargs)


class Storage(TrajectoryStorage):
    """The storage, with the arguments of ``LazyTensorStorage``."""

    def __init__(self, max_size: int = 0, *, device: Any = "cpu", **kwargs: Any) -> None:
        max_size = kwargs.pop("max_trajectories", max_size)  # of a copy
        known = ("max_writers", "compact", "staging_bytes", "optional_keys")
        steps = kwargs.pop("max_total_steps", 64 * max_size)
        for name in set(kwargs) - set(known):
            kwargs.pop(name)
        super().__init__(max_size, steps, device="cpu" if device == "auto" else device, **kwargs)


def made(value: Any) -> Any:
    """Return what a part is made of: tests pass classes and partial functions too."""
    return value() if isinstance(value, functools.partial) else value


def substitute() -> None:
    """Put the classes of this library where TorchRL's tests import them from."""
    storages, writers = torchrl.data.replay_buffers.storages, torchrl.data.replay_buffers.writers
    buffers = {"ReplayBuffer": StepBuffer, "TensorDictReplayBuffer": StepBuffer}
    places = [torchrl.data, torchrl.data.replay_buffers, torchrl.data.replay_buffers.replay_buffers]
    for module in places:
        for name, cls in buffers.items():
            setattr(module, name, cls)
    for module in (torchrl.data, torchrl.data.replay_buffers, storages):
        module.LazyTensorStorage = Storage
    for module in (torchrl.data, torchrl.data.replay_buffers, writers):
        for name in ("RoundRobinWriter", "TensorDictRoundRobinWriter"):
            setattr(module, name, StepWriter)


class Outcomes:
    """Sorts the outcomes of tests."""

    def __init__(self) -> None:
        self.by_file: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.others: Counter[str] = Counter()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        """Take note of the outcome of a test."""
        report = (yield).get_result()
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        kind = report.outcome
        if kind == "failed" and call.excinfo is not None:
            first = (str(call.excinfo.value).strip().splitlines() or [""])[0][:120]
            if "SegmentTree" in first:
                kind = "skipped"  # TorchRL's compiled extension is not there
            else:
                kind = "refused" if self.refused(call.excinfo.value) else "other"
            if kind == "other":
                test = item.nodeid.split("/")[-1].split("[")[0]
                self.others[f"{test}: {call.excinfo.typename}: {first}"] += 1
        self.by_file[item.path.name][kind] += 1

    @staticmethod
    def refused(error: BaseException | None) -> bool:
        """Return whether an error, or one that it comes from, is of this library."""
        while error is not None:
            if isinstance(error, EmbodiChainRLError):
                return True
            if "TrajectoryReplayBuffer" in str(error) or "only accepts TensorDictBase" in str(error):
                return True
            error = error.__cause__ or error.__context__
        return False


def main() -> None:
    """Run the tests that the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torchrl", type=Path, help="a checkout of github.com/pytorch/rl, near v0.14.1")
    parser.add_argument("--files", nargs="+", default=FILES)
    parser.add_argument("-k", default="", help="as of pytest")
    arguments = parser.parse_args()
    folder = arguments.torchrl.expanduser() / "test" / "rb"
    sys.path[:0] = [str(folder), str(folder.parent)]
    substitute()
    outcomes = Outcomes()
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", str(folder)]
    files = [str(folder / file) for file in arguments.files]
    pytest.main([*options, *(["-k", arguments.k] if arguments.k else []), *files], plugins=[outcomes])
    print("\n| file | passed | refused on purpose | other | skipped |\n|---|---|---|---|---|")
    for file, counts in outcomes.by_file.items():
        print(f"| {file} | {counts['passed']} | {counts['refused']} | {counts['other']} | {counts['skipped']} |")
    for line, count in sorted(outcomes.others.items()):
        print(f"{count} times {line}")


if __name__ == "__main__":
    main()
