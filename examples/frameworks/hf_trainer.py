"""Train from a live simulator with Hugging Face's Trainer, on one process or several.

Run it with ``python examples/frameworks/hf_trainer.py``, or on two processes with
``torchrun --nproc-per-node 2 examples/frameworks/hf_trainer.py``. It needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

import tyro
from pendulum import Dynamics, make_engine, report
from transformers import Trainer, TrainingArguments

from embodichain_rl import OnlineDataset


def main(steps: int = 100, output_dir: str = "outputs/hf_trainer", cpu: bool = False) -> None:
    """Train a model of a pendulum.

    Args:
        steps: updates of the model.
        output_dir: where the Trainer keeps its files.
        cpu: whether a GPU is left alone.
    """
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,  # the stream has no end
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        remove_unused_columns=False,  # a chunk's columns are not looked up in the signature of forward()
        accelerator_config={"dispatch_batches": False},  # each process reads a stream of its own
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=cpu,
    )
    with make_engine() as engine:
        trainer = Trainer(
            model=Dynamics(),
            args=arguments,
            train_dataset=OnlineDataset(engine, chunk_size=16, as_dict=True),
        )
        trainer.train()
    if trainer.is_world_process_zero():
        report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    tyro.cli(main)
