"""One dataset, handed to the ranks of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import filled_buffer, loading, take
from torch import multiprocessing

from embodichain_rl.datasets import OnlineDataset


def _drawn(batches: list[Any]) -> list[Any]:
    return [batch["index"][:, 0].tolist() for batch in batches]


def _train(rank: int, datasets: dict[str, OnlineDataset], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank == 1:  # so that a count that both ranks share would show
        take(datasets["counted apart"], 1)
    torch.distributed.barrier()
    drawn = {"seeded": [_drawn(take(datasets["seeded"], 3)) for _ in range(2)]}
    drawn["counted apart"] = [_drawn(take(datasets["counted apart"], 3)) for _ in range(2)]
    with loading(datasets["seeded in workers"], 1) as loader:
        drawn["in workers"] = [_drawn(take(loader, 3)) for _ in range(2)]
    drawn["one pass"] = [_drawn(list(datasets["one pass"])) for _ in range(2)]
    torch.distributed.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(drawn))


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_ranks_draw_streams_of_their_own(tmp_path: Path, start_method: str) -> None:
    rb = filled_buffer()
    datasets = {name: OnlineDataset(rb, 8, 3, seed=5) for name in ("seeded", "counted apart", "seeded in workers")}
    datasets["one pass"] = OnlineDataset(rb, 8, 3, replacement=False, passes=1)
    multiprocessing.start_processes(_train, (datasets, str(tmp_path)), nprocs=2, start_method=start_method)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, drawn in enumerate(ranks):
        alone = OnlineDataset(rb, 8, 3, seed=5, rank=rank, world_size=2)
        expected = [_drawn(take(alone, 3)) for _ in range(3)]
        assert drawn["seeded"] == drawn["in workers"] == expected[:2]
        assert drawn["counted apart"] == expected[rank : rank + 2]
    chunks = [
        (n, start) for n, length in enumerate(rb.trajectory_lengths(range(20)).tolist()) for start in range(length - 7)
    ]
    for first, second in zip(ranks[0]["one pass"], ranks[1]["one pass"], strict=True):
        assert sorted(tuple(chunk) for batch in first + second for chunk in batch) == chunks
    assert ranks[0]["seeded"] != ranks[1]["seeded"]
