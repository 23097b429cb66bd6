from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from waiting import wait_for_children

# Else every process that is forked from the server imports it all for itself, which takes seconds.
multiprocessing.set_forkserver_preload(
    ["embodichain_rl.datasets", "embodichain_rl.engine.worker", "gymnasium", "torchrl.collectors"]
)

# Hypothesis would fail an example that takes 0.2 s, and a test whose first examples take 1 s to draw: where others have
# the processor, any does.
hypothesis.settings.register_profile(
    "no limits of time", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("no limits of time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_process_behind() -> Iterator[None]:
    """Else the next module, which looks at the processes of its own engines, would be blamed for it."""
    yield
    gc.collect()  # an exception that a DataLoader's worker has raised keeps the loader, and its workers, in a cycle
    wait_for_children()
