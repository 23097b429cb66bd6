from __future__ import annotations

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. On as many processes as there are cores, its threads only wait for each other, and a thread
# of OpenMP waits busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all tests are collected; see pytest_collection_finish

# For all interpreters that tests start; see the file there.
_startup = str(Path(__file__).parent / "support" / "startup")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_startup, os.environ.get("PYTHONPATH")]))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from waiting import wait_for_children  # noqa: E402

# Otherwise each process that is forked from the server imports them again, which takes seconds. tensordict imports the
# last two, where they are installed, when it first looks at an object that is no tensor.
multiprocessing.set_forkserver_preload(
    [
        "embodichain_rl.datasets.online_data",
        "embodichain_rl.engine.data",
        "embodichain_rl.engine.workers",
        "gymnasium",
        "torchrl.collectors",
        "pandas",
        "h5py",
    ]
)

# By default, Hypothesis fails an example that takes 0.2 s, and a test whose first examples take 1 s to draw. On a busy
# machine, any test does.
hypothesis.settings.register_profile(
    "no limits of time", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("no limits of time")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would hand out the files with the most tests first, so the few long tests would come last: one
    # process would run them, and the other one would wait for it.
    config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
    if hasattr(
        config, "workerinput"
    ):  # in a process of pytest-xdist: files with slow tests first, then those with many
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))  # a file's tests stay together


def pytest_collection_finish() -> None:
    # Libraries and test modules are millions of objects that live as long as the process. Each collection of garbage
    # would look at them again, and so would each forked process.
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_process_behind() -> Iterator[None]:
    """Wait for the processes of a module, since the next one checks that its engines leave none.

    Set the default start method before it, too: whatever starts a process in the default way chooses that way for good,
    and the locks of TorchRL's buffers depend on it. The default that TorchRL sets is "spawn". A process that is forked
    from the server inherits as little, but starts without seconds of imports. Tests of the ways to start name them.
    """
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    gc.collect()  # an exception that a DataLoader's worker has raised keeps the loader, and its workers, in a cycle
    wait_for_children()
