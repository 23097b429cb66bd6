"""The distribution of draws, as in ``benchmarks/unbiased.py``, in small numbers; and what that test notices."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import unbiased
from _expected_draws import Chunks, Tally, Trajectories, chunks_of
from unbiased import KINDS, Config, by_recency, by_steps, evenly, padded, whole

DRAWS = 5_000
"""Chunks for each kind: enough to notice a bias of a few percent by length or position."""

CHANCE = 1e-5
"""A p-value below this comes once in 5,000 runs of all kinds, if the draws are right."""


def test_what_is_drawn_is_what_was_asked_for() -> None:
    config = Config(draws=DRAWS, turns=2, kinds=tuple(name for name in KINDS if "batches" not in name))
    for name, tally in unbiased.run(config, seed=0).items():
        assert tally.draws >= DRAWS / 10, name
        assert tally.p_value() > CHANCE, name


def trajectories() -> Trajectories:
    lengths = np.arange(4, 60)
    ids = np.arange(len(lengths))
    return Trajectories(ids, lengths, ids % 3, ids, np.ones(len(ids)), 12)


def drawn_from(chunks: Chunks, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and offsets that follow the given probabilities."""
    found = np.random.default_rng(0).choice(len(chunks.ids), draws, p=chunks.probabilities)
    return chunks.ids[found], chunks.offsets[found]


ASKED = chunks_of(trajectories(), whole, evenly)


def test_right_draws_pass() -> None:
    tally = Tally()
    tally.add(ASKED, *drawn_from(ASKED))
    assert tally.p_value() > 0.01


@pytest.mark.parametrize("weight", [by_steps, by_recency], ids=["by length", "by age"])
def test_a_bias_is_noticed(weight: unbiased.Weight) -> None:
    tally = Tally()
    tally.add(ASKED, *drawn_from(chunks_of(trajectories(), whole, weight)))
    assert tally.p_value() < CHANCE


def test_a_bias_by_position_is_noticed() -> None:
    """First and last chunks are drawn three times as often as the others."""
    edges = (ASKED.cells % 6 == 0) | (ASKED.cells % 6 == 5)
    biased = ASKED.probabilities * np.where(edges, 3, 1)
    tally = Tally()
    tally.add(ASKED, *drawn_from(replace(ASKED, probabilities=biased / biased.sum())))
    assert tally.p_value() < CHANCE


def test_chunks_that_must_not_be_drawn_are_noticed() -> None:
    with pytest.raises(AssertionError, match="not valid"):
        Tally().add(ASKED, *drawn_from(chunks_of(trajectories(), padded(7, 7), evenly)))
