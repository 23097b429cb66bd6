"""The script of two ranks in test_frameworks.py: recipes, and the batches that the loops of other libraries get."""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from steps import check_chunk, make_buffer, make_trajectory
from tensordict import TensorDict
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from embodichain_rl import OnlineDataset

RECIPES = Path(__file__).parents[2] / "examples" / "frameworks"

WAYS: dict[str, dict[str, bool]] = {
    "streams": {"dispatch_batches": False},
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True},
    "dispatched batches": {"dispatch_batches": True},
}


def say(line: str) -> None:
    """Write a line at once: both ranks write to one pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def recipe(name: str, *arguments: str) -> None:
    """Run a recipe in this process."""
    sys.argv = [name, *arguments]
    say(f"recipe {name}")
    runpy.run_path(str(RECIPES / name), run_name="__main__")


def check(batch: dict[str, Any]) -> None:
    """Check that a flat batch holds whole chunks ``[B, L]``."""
    assert isinstance(batch, dict)
    data = TensorDict(batch_size=batch["action"].shape[:2])
    for name, value in batch.items():
        data.set("label" if name == "mark" else tuple(name.split(".")), value)
    check_chunk(data)


def without_label(data: TensorDict) -> TensorDict:
    """Rename an entry: the Trainer takes what is called "label" for one number."""
    return data.rename_key_("label", "mark")


def ways_of_accelerate(name: str, options: dict[str, bool]) -> None:
    """Report what a rank is given by a prepared loader."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    rb = make_buffer([make_trajectory(number, 20 + number) for number in range(5)])
    whole = name == "dispatched batches"
    dataset = OnlineDataset(rb, chunk_size=4, batch_size=8 if whole else None, seed=0, as_dict=True)
    batches = iter(accelerator.prepare(DataLoader(dataset, batch_size=None if whole else 8)))
    for _ in range(3):
        batch = next(batches)
        check(batch)
    drawn = batch["index"][:, 0].tolist()
    say(f"{name}: rank {accelerator.process_index}, {len(drawn)} chunks, {drawn}")
    accelerator.wait_for_everyone()
    AcceleratorState._reset_state()
    GradientState._reset_state()


class Checked(torch.nn.Module):
    """A model that looks at its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a loss."""
        check(batch)
        say(f"trainer: {len(batch['action'])} chunks")
        return {"loss": self.weight**2}


def hugging_face_trainer(output_dir: str) -> None:
    """Train a model that looks at its batches, with the Trainer's default ways."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=3,
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rb = make_buffer([make_trajectory(number, 20 + number) for number in range(5)])
    dataset = OnlineDataset(rb, chunk_size=4, transform=without_label, as_dict=True)
    Trainer(Checked(), arguments, train_dataset=dataset).train()


if __name__ == "__main__":
    sys.path.insert(0, str(RECIPES))
    for way in WAYS.items():
        ways_of_accelerate(*way)
    with tempfile.TemporaryDirectory() as directory:
        hugging_face_trainer(directory)
        recipe("hf_trainer.py", "--steps", "60", "--cpu", "--output-dir", directory)
    recipe("accelerate_loop.py", "--steps", "60", "--cpu")
