"""The benchmark of image augmentation, with small batches: every contestant augments."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from augmenting import CHUNKS, IMAGES, NOTHING, WHOLE, Case, image_by_image, make_buffer, measure

CASE = Case(batch_size=2, chunk_size=2, cameras=2, height=12, width=14)


def test_all_contestants_are_measured() -> None:
    results = measure(CASE, 0.0)
    assert {result["contestant"] for result in results} == {WHOLE, CHUNKS, IMAGES, NOTHING}
    assert all(result["chunks_per_second"] > 0 for result in results)


def test_image_by_image_changes_the_images_alone() -> None:
    random.seed(0)
    (chunk, _) = make_buffer(CASE, "cpu").sample().unbind(0)
    augmented = image_by_image(chunk, CASE.keys)
    for key in chunk.keys(True, True):
        assert augmented[key].shape == chunk[key].shape
        assert augmented[key].dtype == chunk[key].dtype
        assert torch.equal(augmented[key], chunk[key]) is (key not in CASE.keys), key
