"""Train from a live simulator with PyTorch's DistributedDataParallel.

Run it with ``torchrun --nproc-per-node 2 examples/frameworks/torchrun_ddp.py``.
"""

from __future__ import annotations

import torch
import tyro
from pendulum import Dynamics, make_engine, report
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from embodichain_rl import OnlineDataset


def main(steps: int = 100, seed: int = 0) -> None:
    """Train a model of a pendulum.

    Args:
        steps: updates of the model.
        seed: of the draws; every rank draws a stream of its own from it.
    """
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    with make_engine(seed=seed + rank) as engine:  # each process has simulators of its own
        dataset = OnlineDataset(engine, chunk_size=16, batch_size=32, seed=seed, as_dict=True)
        model = DistributedDataParallel(Dynamics())
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses: list[float] = []
        for batch in DataLoader(dataset, batch_size=None):
            loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    if rank == 0:
        report(losses)
    distributed.destroy_process_group()


if __name__ == "__main__":
    tyro.cli(main)
