"""Runs a script as its own ``__main__``, and writes down its updates, losses, and the time that it took to sample.

python measured.py RESULT.json SCRIPT [ARGUMENTS...]
"""

from __future__ import annotations

import functools
import json
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    """Run the script that the command line names."""
    result, script, *arguments = sys.argv[1:]
    losses: list[float] = []
    updates = 0
    sampled = {"steps": 0, "deep": 0}
    seconds: list[float] = []

    def updated(*_: Any) -> None:
        nonlocal updates
        updates += 1

    def noting_losses(backward: Any) -> Any:
        @functools.wraps(backward)
        def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            losses.append(float(self.detach().sum()))
            return backward(self, *args, **kwargs)

        return noted

    def timed(sample: Any) -> Any:
        @functools.wraps(sample)
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            sampled["deep"] += 1
            begun = time.perf_counter()
            try:
                batch = sample(self, *args, **kwargs)
            finally:
                sampled["deep"] -= 1
            if not sampled["deep"]:
                data = batch[0] if isinstance(batch, tuple) else batch
                sampled["steps"] += data.numel()
                seconds.append(time.perf_counter() - begun)
            return batch

        return noted

    import torchrl.data

    from embodichain_rl import TrajectoryReplayBuffer

    register_optimizer_step_post_hook(updated)
    torch.Tensor.backward = noting_losses(torch.Tensor.backward)  # type: ignore[method-assign]
    for cls in (torchrl.data.ReplayBuffer, torchrl.data.TensorDictReplayBuffer, TrajectoryReplayBuffer):
        cls.sample = timed(cls.sample)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    begun = time.perf_counter()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        tenth = max(1, len(losses) // 10)
        Path(result).write_text(
            json.dumps(
                {
                    "updates": updates,
                    "first_loss": sum(losses[:tenth]) / tenth if losses else None,
                    "last_loss": sum(losses[-tenth:]) / tenth if losses else None,
                    "finite": all(loss == loss and abs(loss) != float("inf") for loss in losses),
                    "batches": len(seconds),
                    "steps": sampled["steps"],
                    "sample_seconds": statistics.median(seconds) if seconds else None,
                    "seconds": time.perf_counter() - begun,
                }
            )
        )


if __name__ == "__main__":
    main()
