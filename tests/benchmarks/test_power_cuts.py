"""A short version of ``benchmarks/power_cuts.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import power_cuts


@pytest.mark.parametrize("ragged", [False, True])
def test_what_was_synced_survives_power_cuts_and_nothing_is_torn(ragged: bool) -> None:
    found = power_cuts.run(power_cuts.Config(cuts=16, seed=3, ragged=ragged))
    assert found["cuts"] >= 16
    assert found["trajectories"] > 10
    assert {name: found[name] for name in power_cuts.BROKEN} == dict.fromkeys(power_cuts.BROKEN, 0)
