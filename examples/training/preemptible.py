"""A run that a cluster may end at any time: on SIGTERM or SIGUSR1 it saves and exits 0; started again, it goes on.

Run it twice with the same folder: ``python examples/training/preemptible.py --folder runs/pendulum``. The scripts for
SLURM, Kubernetes, systemd and others are in docs/operations.md.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import tyro

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main(folder: Path = Path("runs/pendulum"), steps: int = 2000, num_workers: int = 1, save_every: int = 500) -> None:
    """Train a model of a pendulum.

    Args:
        folder: the checkpoint; the run goes on from it.
        steps: updates of the model, those of earlier runs included.
        num_workers: worker processes; 0 collects on a thread of this one.
        save_every: updates between two checkpoints.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # nothing is learned yet; engine.start() stops what it started
    # Imported now, so that the signals are handled from the beginning.
    import torch
    from torch import nn

    from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    cfg = OnlineDataEngineCfg(
        buffer_size=32,
        max_episode_steps=100,
        gym_config={"id": "Pendulum-v1", "max_episode_steps": 100},
        num_workers=num_workers,
        shutdown_timeout=4.0,  # of the seconds between the signal and SIGKILL
        progress_bar=False,
    )
    step = 0
    if (folder / "engine.json").exists():
        engine = OnlineDataEngine.load(folder, cfg)
        model.load_state_dict(engine.saved_states["model"])
        optimizer.load_state_dict(engine.saved_states["optimizer"])
        step = engine.saved_states["step"]
        print(f"goes on after step {step}", flush=True)
    else:
        engine = OnlineDataEngine(cfg)
    with engine:
        received: list[int] = []
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: received.append(number))

        def save() -> None:
            # Whenever this process is killed, one whole checkpoint is there.
            engine.save(folder, model=model, optimizer=optimizer, step=step)
            print(f"saved after step {step}", flush=True)

        while step < steps and not received:
            batch = engine.sample_batch(32, 16)
            change = batch["next", "observation"] - batch["observation"]
            loss = nn.functional.mse_loss(model(torch.cat([batch["observation"], batch["action"]], dim=-1)), change)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % save_every == 0:
                save()
        save()
        print(f"{'preempted' if received else 'done'} after step {step}", flush=True)
        sys.exit(0)  # all is saved: if a worker hangs now, it is killed, and the exit code is still 0


if __name__ == "__main__":
    tyro.cli(main)
