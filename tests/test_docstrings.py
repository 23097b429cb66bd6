"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torchrl.data import TensorDictReplayBuffer

import embodichain_rl
import embodichain_rl.datasets
import embodichain_rl.replay

MODULES = sorted(module.name for module in pkgutil.walk_packages(embodichain_rl.__path__, "embodichain_rl."))

# What a reader of an example takes for granted.
KNOWN = {
    "np": np,
    "torch": torch,
    "DataLoader": DataLoader,
    "TensorDict": TensorDict,
    "TensorDictReplayBuffer": TensorDictReplayBuffer,
    **{name: getattr(embodichain_rl.replay, name) for name in embodichain_rl.replay.__all__},
    **{name: getattr(embodichain_rl.datasets, name) for name in embodichain_rl.datasets.__all__},
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if name == "embodichain_rl.cluster.producer":
        pytest.importorskip("ray", reason="needs Ray, the extra 'ray'")
    if name == "embodichain_rl.replay.device.triton_gather":
        pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for example in finder.find(module, name, extraglobs=KNOWN):
        if example.examples and example.globs.get("__name__") == name:
            runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
