"""Trajectories and buffers as pictures, films, in notebooks and in Rerun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from test_metrics import buffer_of, episode

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.monitor import contact_sheet, film, log_to_rerun, plot_buffer, plot_trajectory, show
from embodichain_rl.monitor.trajectories import curves_of, images_of, segments_of, texts_of, without_padding

pytest.importorskip("matplotlib")


def filmed(length: int = 12) -> TensorDict:
    data = episode(length)
    data["pixels"] = torch.arange(length * 16 * 20 * 3).reshape(length, 16, 20, 3).to(torch.uint8)
    data["wrist"] = torch.rand(length, 3, 16, 16)
    data["segment_id"] = torch.arange(length) // 5
    data["action"] = torch.randn(length, 2)
    return data


def test_what_there_is_to_see() -> None:
    rb = buffer_of(filmed())
    steps = rb[0]
    images = images_of(steps)
    assert {name: frames.shape for name, frames in images.items()} == {
        "pixels": (12, 16, 20, 3),
        "wrist": (12, 16, 16, 3),
    }
    assert list(curves_of(steps)) == ["action", "next.reward", "next.success", "observation"]
    assert segments_of(steps) == [(0, 5, 0), (5, 10, 1), (10, 12, 2)]
    assert texts_of(steps, rb.storage) == {"trajectory.task": "lift"}


def test_a_trajectory() -> None:
    figure = plot_trajectory(filmed())
    assert len(figure.axes) == 2 + 4  # two film strips, four curves
    figure = plot_trajectory(buffer_of(filmed()).sample()[0], keys=["action"])
    assert len(figure.axes) == 2 + 1


def test_padding_is_left_out() -> None:
    chunk = buffer_of(episode(4), chunk_size=8, strict_length=False).sample()[0]
    assert len(without_padding(chunk)) == 4
    (line, *_) = plot_trajectory(chunk, keys=["observation"]).axes[0].lines
    assert len(line.get_xdata()) == 4


def test_a_buffer_empty_or_not() -> None:
    rb = buffer_of()
    assert plot_buffer(rb).axes
    rb.extend(episode())
    rb.sample()
    assert "1 trajectories" in plot_buffer(rb).get_suptitle()


def test_sheets_of_images() -> None:
    assert sum(bool(axes.images) for axes in contact_sheet(filmed(12)).axes) == 12
    batch = buffer_of(filmed()).sample()
    assert sum(bool(axes.images) for axes in contact_sheet(batch, key="wrist", columns=4).axes) == 8 * 4
    with pytest.raises(InvalidArgumentError, match="images are"):
        contact_sheet(episode())


def test_a_film(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    film(filmed(12), tmp_path / "episode.mp4", fps=10.0)
    with av.open(str(tmp_path / "episode.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 10
    assert len(frames) == 12
    assert frames[0].shape == (16, 36, 3)
    with pytest.raises(InvalidArgumentError, match="no such images"):
        film(episode(), tmp_path / "none.mp4")


def test_in_a_notebook() -> None:
    shown = show(buffer_of(filmed()).sample())
    page = shown._repr_html_()
    assert "8 × 4" in page
    assert "data:image/png;base64," in page
    assert "next.reward" in page
    assert repr(shown).startswith("TensorDict")


def test_in_rerun(tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    log_to_rerun(buffer_of(filmed()).sample()[:2], path=tmp_path / "batch.rrd", fps=10.0)
    content = (tmp_path / "batch.rrd").read_bytes()
    assert content.startswith(b"RRF")
    for name in (b"/chunk/1/image/pixels", b"/chunk/0/next.reward", b"/chunk/0/segment_id"):
        assert name.lstrip(b"/") in content
    with pytest.raises(InvalidArgumentError, match="one of path"):
        log_to_rerun(filmed(), path=tmp_path / "both.rrd", spawn=True)


def test_what_is_no_trajectory() -> None:
    with pytest.raises(InvalidArgumentError, match=r"rb\[0\]"):
        plot_trajectory(buffer_of(episode()).sample())
    with pytest.raises(InvalidArgumentError, match="TrajectoryReplayBuffer"):
        plot_buffer(episode())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="TensorDict"):
        show([1])  # type: ignore[arg-type]
