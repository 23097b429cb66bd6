"""TorchRL's own scripts, and what their constructors are replaced by to run them on a buffer of whole trajectories."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CLIENTS", "LEFT_OUT", "Client"]


@dataclass(frozen=True)
class Client:
    """One script.

    Attributes:
        name: what it is called in the table.
        script: its path in TorchRL's repository.
        buffers: what is assigned instead, by the name that is assigned to and the class that is called.
        files: the files that are changed; by default the script.
        numbers: numbers that are assigned, or passed by keyword, so that the script is short: in both runs.
        arguments: the arguments on its command line, in both runs.
    """

    name: str
    script: str
    buffers: dict[tuple[str, str], str]
    files: tuple[str, ...] = ()
    numbers: dict[str, int] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


RAGGED = "transform=FlatChunks(pad_output=False)"
TUTORIALS = "tutorials/sphinx-tutorials"
SOTA = "sota-implementations"

CLIENTS = (
    Client(
        "recurrent slice pipeline",
        "examples/replay-buffers/recurrent_slice_sampler_pipeline.py",
        {
            ("rb", "TensorDictReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=2_000, max_total_steps=2_000, "
            f"chunk_size=MAX_SLICE_LEN, strict_length=False, batch_size=NUM_SLICES, {RAGGED})"
        },
    ),
    Client(
        "recurrent sequences",
        f"{TUTORIALS}/recurrent_sequence_training.py",
        {
            ("rb", "TensorDictReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=1024, max_total_steps=1024, "
            f"chunk_size=SLICE_LEN, strict_length=False, batch_size=NUM_SLICES, {RAGGED})"
        },
    ),
    Client(
        "trajectory assembly",
        f"{TUTORIALS}/collector_trajectory_assembly.py",
        {
            ("rb", "ReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=1_000, max_total_steps=10_000, "
            "chunk_size=16, batch_size=2, transform=FlatChunks())",
            ("rb_async", "ReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=1_000, max_total_steps=10_000, "
            "chunk_size=16, shared=True, count='steps', transform=FlatChunks())",
        },
    ),
    Client(
        "DQN with an RNN",
        f"{TUTORIALS}/dqn_with_rnn.py",
        {
            ("rb", "TensorDictReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=1_000, max_total_steps=20_000, "
            "chunk_size=50, strict_length=False, batch_size=4, prefetch=10, count='steps', "
            "transform=FlatChunks(pad_output=False))"
        },
        numbers={"total_frames": 1_150, "utd": 4},
    ),
    Client(
        "DreamerV3",
        f"{SOTA}/dreamer_v3/dreamer_v3.py",
        {
            ("rb", "ReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=1_000, "
            "max_total_steps=cfg.replay_buffer.buffer_size, chunk_size=cfg.replay_buffer.seq_len, "
            "batch_size=cfg.replay_buffer.batch_size, traj_key=('collector', 'traj_ids'), init_key='is_init', "
            "count='steps')"
        },
        arguments=("collector.total_frames=1600", "logger.eval_every=100000", "optimization.device=cpu"),
    ),
    Client(
        "SAC",
        f"{SOTA}/sac/sac.py",
        {
            ("replay_buffer", "TensorDictReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=buffer_size // 100, "
            "max_total_steps=buffer_size, chunk_size=1, weights='steps', squeeze=True, prefetch=prefetch, "
            "batch_size=batch_size, shared=shared)"
        },
        files=(f"{SOTA}/sac/utils.py",),
        arguments=(
            *("env.name=Pendulum-v1", "env.max_episode_steps=200", "collector.env_per_collector=1"),
            *("collector.total_frames=1400", "collector.init_random_frames=1000", "collector.frames_per_batch=200"),
            *("collector.init_env_steps=10", "replay_buffer.size=100000", "logger.backend=", "network.device=cpu"),
        ),
    ),
    Client(
        "QMIX",
        f"{SOTA}/multiagent/qmix_vdn.py",
        {
            ("replay_buffer", "TensorDictReplayBuffer"): "TrajectoryReplayBuffer(max_trajectories=10_000, "
            "max_total_steps=cfg.buffer.memory_size, sampler=ChunkSampler(1, replacement=False, squeeze=True), "
            "batch_size=cfg.train.minibatch_size)"
        },
        arguments=(
            *("env.max_steps=20", "collector.n_iters=4", "collector.frames_per_batch=600", "train.num_epochs=2"),
            *("train.minibatch_size=60", "eval.evaluation_episodes=1", "logger.backend=", "env.vmas_envs=30"),
        ),
    ),
)

LEFT_OUT = {
    f"{SOTA}/sac/sac-async.py": "needs two GPUs (the policy is put on cuda:1)",
    f"{SOTA}/decision_transformer/online_dt.py": "needs a download of D4RL's data",
    f"{TUTORIALS}/rb_tutorial.py": "its steps belong to no trajectories",
    "examples/replay-buffers/checkpoint.py": "compares TorchRL's storage checkpointers; save with rb.dumps(path)",
}
"""Scripts that are not run, and why."""
