"""The CUDA device itself. ``test_device_storage.py`` tests the code around it on a simulated device."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from steps import LABEL, Child, check_chunk, make_buffer, make_trajectory, small
from tensordict import TensorDict
from test_device_storage import extend, sample
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import BufferMemoryError, InvalidArgumentError, SharingError, UnsupportedOperationError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 3)], ids=str)
def test_without_cuda_the_error_says_what_to_do(device: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sees no|built without CUDA.*Install a torch for CUDA.*use 'cpu'"):
        TrajectoryStorage(4, 100, device=device)
    with pytest.raises(InvalidArgumentError, match="this torch"):
        TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=100, chunk_size=2, device=device)


def test_staging_bytes_without_a_device_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="staging_bytes=1000 with device='cpu'"):
        TrajectoryStorage(4, 100, staging_bytes=1000)


def on_cuda(**kwargs: Any) -> TrajectoryReplayBuffer:
    storage = TrajectoryStorage(
        kwargs.pop("max_trajectories", 8), kwargs.pop("max_steps", 400), device="cuda", **kwargs
    )
    return make_buffer(storage=storage, batch_size=64)


def check_on_device(batch: TensorDict) -> None:
    """Check that all of a batch is on the device and intact."""
    assert all(value.is_cuda for value in batch.values(True, True))
    check_chunk(batch.cpu())


@pytest.mark.gpu
class TestOnTheDevice:
    def test_a_device_that_does_not_exist_is_refused(self) -> None:
        count = torch.cuda.device_count()
        with pytest.raises(InvalidArgumentError, match=f"there are {count} CUDA devices"):
            TrajectoryStorage(4, 100, device=f"cuda:{count}")

    def test_a_buffer_larger_than_the_device_is_refused(self) -> None:
        rb = on_cuda(max_trajectories=10, max_steps=10**10)
        with pytest.raises(BufferMemoryError, match=r"needs [\d,]+ bytes .* on cuda:0, which has [\d,]+ bytes"):
            rb.extend(make_trajectory(0, 5))

    @pytest.mark.parametrize("compact", [False, True])
    def test_cpu_data_is_read_on_the_device(self, compact: bool) -> None:
        rb = on_cuda(compact=compact)
        for number in range(30):
            rb.extend(small(number, 5 + number) if compact else make_trajectory(number, 5 + number))
        rb.storage.flush()
        for _ in range(20):
            check_on_device(rb.sample())
        check_chunk(rb[:].cpu())

    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("environments", [4, 64])
    def test_device_data_is_written_on_the_device(self, environments: int, compact: bool) -> None:
        rb = on_cuda(max_trajectories=4 * environments, max_steps=40 * environments, compact=compact)
        steps = small if compact else make_trajectory
        data = torch.stack([torch.cat([steps(10 * env + k, 6) for k in range(3)]) for env in range(environments)])
        for part in data.cuda().split([4, 7, 7], dim=1):
            rb.extend(part)
            part.zero_()
        assert len(rb) == 3 * environments
        numbers = [int(trajectory[LABEL][0, 0]) for trajectory in rb.storage]
        assert sorted(numbers) == sorted(10 * env + k for env in range(environments) for k in range(3))
        check_chunk(rb[:].cpu())
        for _ in range(5):
            check_on_device(rb.sample())

    @pytest.mark.parametrize("chunk_size", [1, 3, 7])
    @pytest.mark.parametrize("compact", [False, True])
    def test_all_dtypes_are_gathered(self, chunk_size: int, compact: bool) -> None:
        rb = on_cuda(compact=compact)
        rb.set_sampler(ChunkSampler(chunk_size, squeeze=chunk_size == 1))
        for number in range(8):
            steps = small(number, 20) if compact else make_trajectory(number, 20)
            steps["trajectory", "mass"] = torch.full((20, 3), float(number)).bfloat16()
            rb.extend(steps)
        rb.storage.flush()
        for size in (1, 5, 300):
            batch = rb.sample(size)
            assert all(value.is_cuda for value in batch.values(True, True))
            index = batch["index"].cpu()
            assert torch.equal(index[..., 0], batch["trajectory", "id"].cpu())
            again = rb.storage.get(batch["index"])  # through one index_select a key
            for key in again.keys(True, True):
                assert torch.equal(again[key], batch[key]), key

    def test_is_not_sampled_while_a_graph_is_captured(self) -> None:
        rb = on_cuda()
        rb.extend(make_trajectory(0, 20))
        rb.storage.flush()
        rb.sample()
        with (
            pytest.raises(UnsupportedOperationError, match="each replay would return the same"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            rb.sample()
        check_on_device(rb.sample())

    @pytest.mark.parametrize("options", [{"pad": "both"}, {"sampling_mode": "episode"}])
    def test_other_requests(self, options: dict[str, Any]) -> None:
        rb = on_cuda()
        rb.set_sampler(ChunkSampler(7, **options))
        for number in range(8):
            rb.extend(make_trajectory(number, 20))
        rb.storage.flush()
        batch = rb.sample()
        assert all(value.is_cuda for value in batch.values(True, True))
        assert (batch[LABEL][..., 1] == batch["trajectory", "step"]).all()

    def test_windows(self) -> None:
        rb = on_cuda()
        rb.set_sampler(ChunkSampler(windows={LABEL: (-2, 1)}, pad="both"))
        rb.extend(make_trajectory(0, 20))
        rb.storage.flush()
        batch = rb.sample()
        assert batch[LABEL].is_cuda
        assert (batch[LABEL][:, 2, 1] == batch["trajectory", "step"]).all()

    def test_sampling_does_not_block_on_the_device(self) -> None:
        rb = on_cuda()
        for number in range(8):
            rb.extend(make_trajectory(number, 20))
        rb.storage.flush()
        rb.sample()
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = [rb.sample() for _ in range(10)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for batch in batches:
            check_on_device(batch)

    def test_no_chunk_is_torn_with_other_writers_and_several_streams(self) -> None:
        rb = on_cuda(max_trajectories=4, max_steps=120)
        rb.extend(make_trajectory(0, 20))
        rb.storage.flush()
        producers = [
            multiprocessing.get_context("spawn").Process(target=produce, args=(rb, number), daemon=True)
            for number in range(2)
        ]
        for producer in producers:
            producer.start()
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        count = 0
        while any(producer.is_alive() for producer in producers):
            with torch.cuda.stream(streams[count % 3]):
                batch = rb.sample()
                if count % 3 == 0:
                    rb.extend(make_trajectory(10**6 + count, 17).cuda())
                check_chunk(batch.cpu())
            count += 1
        for producer in producers:
            producer.join(PATIENCE)
            assert producer.exitcode == 0
        assert rb.stats()["published"] > 600

    @pytest.mark.parametrize("start_method", ["spawn", "fork"])
    def test_other_processes_can_only_write(self, start_method: str) -> None:
        rb = on_cuda()
        rb.extend(small(0, 3))
        child = Child(start_method, rb)
        child.call(extend, 0, 10)
        rb.storage.flush()
        check_on_device(rb.sample())
        with pytest.raises(SharingError, match="num_workers=0"):
            child.call(sample)
        child.end()

    def test_an_engine_keeps_its_buffer_on_the_device(self) -> None:
        cfg = OnlineDataEngineCfg(
            buffer_size=4,
            max_episode_steps=20,
            gym_config={"id": "Pendulum-v1"},
            buffer_device="cuda",
            progress_bar=False,
        )
        with OnlineDataEngine(cfg) as engine:
            batch = engine.sample_batch(16, chunk_size=8)
        assert batch["observation"].is_cuda


def produce(rb: TrajectoryReplayBuffer, number: int) -> None:
    for k in range(300):
        rb.extend(make_trajectory(1000 * (number + 1) + k, 5 + k % 20))
