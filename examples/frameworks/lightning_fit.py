"""Train from a live simulator with Lightning, on one process or several.

Run it with ``python examples/frameworks/lightning_fit.py``, or with two processes that Lightning spawns and that read
one buffer: ``python examples/frameworks/lightning_fit.py --devices 2``. It needs ``pip install lightning``.
"""

from __future__ import annotations

import lightning
import torch
import tyro
from pendulum import Dynamics, make_engine, report
from torch.utils.data import DataLoader

from embodichain_rl import OnlineDataset


class Module(lightning.LightningModule):
    """The model of a pendulum, as Lightning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Dynamics()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch)["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def on_train_end(self) -> None:
        """Report, in the first process."""
        if self.trainer.is_global_zero:
            report(self.losses)


def main(steps: int = 100, devices: int = 1, accelerator: str = "auto") -> None:
    """Train a model of a pendulum.

    Args:
        steps: updates of the model.
        devices: processes that train.
        accelerator: what they train on.
    """
    with make_engine() as engine:
        dataset = OnlineDataset(engine, chunk_size=16, batch_size=32, as_dict=True)
        trainer = lightning.Trainer(
            max_steps=steps,
            devices=devices,
            accelerator=accelerator,
            strategy="ddp_spawn" if devices > 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), DataLoader(dataset, batch_size=None))


if __name__ == "__main__":
    tyro.cli(main)
