"""What is learned from images, as a user runs it, but short; its environment, and its encoder of images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from example_process import EXAMPLES
from scripts import run_script

from embodichain_rl.engine.demonstrations import DemonstrationRollout
from embodichain_rl.engine.environments import EnvMaker

for name in ("matplotlib", "mujoco", "tqdm", "tyro"):
    pytest.importorskip(name, reason="needs the extras [mujoco] and [examples]")

FOLDER = EXAMPLES / "training"


@pytest.fixture
def from_pixels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import from_pixels

    return from_pixels


@pytest.fixture
def renderer(from_pixels: ModuleType) -> str:
    from renderers import RenderingFailedError, run_with_renderer

    try:
        return run_with_renderer(from_pixels.RENDER_ONCE)
    except RenderingFailedError as error:
        pytest.skip(f"no renderer of MuJoCo works here: {error}")


def red_in(image: np.ndarray) -> np.ndarray:
    """Return a mask of the red pixels of an image `[H, W, 3]`."""
    red, green, blue = np.moveaxis(image, -1, 0)
    return (red > 150) & (green < 80) & (blue < 80)


@pytest.mark.slow
@pytest.mark.usefixtures("renderer")
def test_images_are_streamed_trained_on_and_stored_once(tmp_path: Path) -> None:
    arguments = ["--seeds", "3", "4", "--updates", "4", "--seconds", "3600", "--batch-size", "8"]
    arguments += [
        "--buffer-size",
        "8",
        "--min-trajectories",
        "4",
        "--evaluation-episodes",
        "1",
        "--final-episodes",
        "2",
    ]
    arguments += ["--start-method", "forkserver", "--out", str(tmp_path)]
    done = run_script(FOLDER / "from_pixels.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"episodes \(\d+\.\d\d GB\), [\d,]+ frames/s written", done.stderr)
    assert re.search(r"\| 4 \| \d+\.\d% \| \d+\.\d% to \d+\.\d% \|", done.stdout)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["seed"] for result in results] == [3, 4]
    image = 48 * 48 * 3
    for result in results:
        assert result["updates"] == 4
        assert result["frames_trained"] == 4 * 8
        assert result["bytes_streamed"] >= result["frames_collected"] * image
        # Each step needs one image, not two. The rest is a few numbers a step, and one image more per episode.
        assert result["bytes_streamed"] < result["frames_collected"] * image * 1.1
        assert result["bytes_next_stored"] > 1.8 * result["bytes_announced"]
        assert result["bytes_used"] < 1.15 * result["bytes_announced"]
    for picture in ("training_seed_3.png", "training_seed_4.png", "episode.png"):
        assert (tmp_path / picture).stat().st_size > 20_000


def test_the_expert_touches_the_red_ball_and_an_idle_arm_does_not(renderer: str) -> None:
    config = {"id": "reach_env:ReachRedBall-v0", "kwargs": {"renderer": renderer, "noise": 0.1}}
    env = EnvMaker(config, max_episode_steps=20)()
    env.set_seed(0)
    demonstrations = DemonstrationRollout([env])
    for _ in range(12):
        steps = next(demonstrations)
        assert len(steps) == 20
        assert steps["pixels"].shape == (20, 48, 48, 3)
        assert steps["pixels"].dtype == torch.uint8
        assert (steps["pixels"][0] != steps["pixels"][-1]).any()
        assert steps["action"].abs().max() <= 1.0, "the recorded actions are the expert's, without the noise"
        columns = torch.from_numpy(red_in(steps["pixels"][0].numpy())).nonzero()[:, 1].float()
        to_the_right, turned = columns.mean() - 23.5, steps["joints"][-1, 0]
        assert to_the_right.abs() < 3 or to_the_right.sign() == turned.sign(), "it went to something else"
    env.close()
    assert demonstrations.num_rejected == demonstrations.num_failed == 0

    import gymnasium

    env = gymnasium.make("reach_env:ReachRedBall-v0", renderer=renderer)
    for seed in range(12):
        env.reset(seed=seed)
        for _ in range(20):
            *_, truncated, info = env.step(np.zeros(3, np.float32))
            assert not info["is_success"]
        assert truncated
    env.close()


def test_only_the_image_says_where_the_red_ball_is(renderer: str) -> None:
    import gymnasium

    env = gymnasium.make("reach_env:ReachRedBall-v0", renderer=renderer, render_mode="rgb_array")
    first, _ = env.reset(seed=5)
    again, _ = env.reset(seed=5)
    other, _ = env.reset(seed=6)
    assert all((first[key] == again[key]).all() for key in first)
    assert first.keys() == {"pixels", "joints"}
    before, after = red_in(first["pixels"]), red_in(other["pixels"])
    assert before.any()
    assert after.any()
    assert (before != after).any()
    sharp_and_seen = env.render()
    assert (sharp_and_seen[240::5, ::5] == other["pixels"]).all()
    env.close()


def test_the_encoder_says_where_a_bright_pixel_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    from policies.pixels import WhereEncoder

    class Contrast(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 100.0 * images

    encoder = WhereEncoder(3)
    encoder.layers = Contrast()
    images = torch.zeros(2, 5, 9, 3, dtype=torch.uint8)
    for image, feature, row, column in (
        (0, 0, 0, 8),
        (0, 1, 4, 4),
        (0, 2, 2, 0),
        (1, 0, 1, 1),
        (1, 1, 3, 6),
        (1, 2, 0, 0),
    ):
        images[image, row, column, feature] = 255
    places = encoder(images)
    down, across = torch.tensor([[-1, 1, 0], [-0.5, 0.5, -1]]), torch.tensor([[1, 0, -1], [-0.75, 0.5, -1]])
    torch.testing.assert_close(places, torch.cat([down, across], 1))


def test_without_a_renderer_the_error_says_what_to_install(
    from_pixels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "no_such_renderer")
    with pytest.raises(SystemExit, match=r"no_such_renderer: exit code 1, .* `apt install libosmesa6`"):
        from_pixels.find_renderer()
