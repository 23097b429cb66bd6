"""Train from a live simulator with Hugging Face's Accelerate, on one process or several.

Run it with ``python examples/frameworks/accelerate_loop.py``, or on two processes with
``torchrun --nproc-per-node 2 examples/frameworks/accelerate_loop.py``. It needs ``pip install accelerate``.
"""

from __future__ import annotations

import torch
import tyro
from accelerate import Accelerator, DataLoaderConfiguration
from pendulum import Dynamics, make_engine, report
from torch.utils.data import DataLoader

from embodichain_rl import OnlineDataset


def main(steps: int = 100, dispatch_batches: bool = False, split_batches: bool = False, cpu: bool = False) -> None:
    """Train a model of a pendulum.

    Args:
        steps: updates of the model.
        dispatch_batches: whether the first process reads for all of them.
        split_batches: whether the processes divide each batch among them.
        cpu: whether a GPU is left alone.
    """
    loading = DataLoaderConfiguration(dispatch_batches=dispatch_batches, split_batches=split_batches)
    accelerator = Accelerator(dataloader_config=loading, cpu=cpu)
    with make_engine() as engine:  # each process has simulators of its own
        loader = DataLoader(OnlineDataset(engine, chunk_size=16, as_dict=True), batch_size=32)
        model = Dynamics()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses: list[float] = []
        for batch in loader:
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    if accelerator.is_main_process:
        report(losses)
    accelerator.end_training()


if __name__ == "__main__":
    tyro.cli(main)
