"""``embodichain-rl demo``: a few seconds of sampling from a live simulator, with nothing to prepare."""

from __future__ import annotations

import time

from embodichain_rl.engine import OnlineDataEngine, OnlineDataEngineCfg

__all__ = ["COMMAND"]


def demo(
    env: str = "CartPole-v1",
    workers: int = 2,
    buffer_size: int = 64,
    chunk_size: int = 8,
    batch_size: int = 32,
    seconds: float = 5.0,
) -> None:
    """Sample chunks from a live simulator, while worker processes step it.

    Args:
        env: the id of any installed Gymnasium environment. Actions are random if it offers no demonstrations.
        workers: the number of processes that step environments; 0 for a thread of this process.
        buffer_size: how many of the newest episodes the buffer keeps.
        chunk_size: consecutive steps of one episode that make a chunk.
        batch_size: chunks of a batch.
        seconds: how long batches are drawn.
    """
    cfg = OnlineDataEngineCfg(
        buffer_size=buffer_size,
        gym_config={"id": env},
        num_workers=workers,
        refill_threshold=None,  # the workers never rest
        progress_bar=False,
    )
    print(f"Starting {workers} workers of {env} ..." if workers else f"Starting {env} on a thread ...", flush=True)
    with OnlineDataEngine(cfg) as engine:
        batch = engine.sample_batch(batch_size, chunk_size, pad="after")
        print(f"\nA batch has the shape {list(batch.shape)}: {batch_size} chunks of {chunk_size} steps.")
        for key, value in sorted(batch.flatten_keys(".").items()):
            print(f"  {key:<28} {list(value.shape)!s:<16} {str(value.dtype).removeprefix('torch.')}")
        before, began, batches = engine.stats()["inserted"], time.monotonic(), 0
        while (passed := time.monotonic() - began) < seconds:
            engine.sample_batch(batch_size, chunk_size, pad="after")
            batches += 1
        stats = engine.stats()
    written = stats["inserted"] - before
    print(
        f"\nIn {passed:.1f} s: {batches / passed:,.0f} batches a second ({batches * batch_size / passed:,.0f} chunks), "
        f"while {written:,} new episodes were written ({written / passed:,.0f} a second)."
    )
    print(f"The buffer holds {stats['trajectories']:,} episodes; on average they are {stats['age_mean']:.2f} s old.")


COMMAND = demo
