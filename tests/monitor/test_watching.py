"""An engine or a buffer is watched from another process, which leaves no trace."""

from __future__ import annotations

import fcntl
import io
import json
import os
import struct
import termios
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
from steps import Child, make_buffer
from test_metrics import buffer_of, engine_of_producers, episode

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, TrajectoryReplayBuffer
from embodichain_rl.cli import main
from embodichain_rl.errors import InvalidArgumentError, SharingError
from embodichain_rl.monitor import Source, running, serve_prometheus, trace
from embodichain_rl.monitor.metrics import METRICS
from embodichain_rl.monitor.prometheus import prometheus_name
from embodichain_rl.monitor.verdicts import verdicts


@pytest.fixture
def watcher() -> Iterator[Child]:
    """A process without the buffers of this test, which it can only find from outside."""
    child = Child("fork", {})
    yield child
    child.end()


def attach(kept: dict[str, Any], handle: int | str, path: Path | None = None) -> tuple[bool, str]:
    kept["source"] = Source.attach(None if path else handle, path)
    return kept["source"].is_engine, kept["source"].title


def read(kept: dict[str, Any]) -> dict[str, Any]:
    stats: dict[str, Any] = kept["source"].read().stats
    return stats


def detach(kept: dict[str, Any]) -> None:
    kept.clear()


def number_of_trajectory(kept: dict[str, Any]) -> float:
    return float(kept["source"].buffer[0]["next", "reward"].sum())


def test_a_buffer(watcher: Child) -> None:
    rb = buffer_of(episode(10), episode(20))
    rb.sample()
    assert watcher.call(attach, rb.handle) == (False, "")
    seen = watcher.call(read)
    assert (seen["trajectories"], seen["samples"], seen["return_max"]) == (2, 8, 20.0)
    rb.extend(episode(30))
    assert watcher.call(read)["return_max"] == 30.0
    assert watcher.call(number_of_trajectory) == 10.0


def test_it_leaves_no_trace(watcher: Child) -> None:
    rb = buffer_of(episode(10))
    before, files = rb.stats(), len(os.listdir("/proc/self/fd"))
    watcher.call(attach, rb.handle)
    watcher.call(read)
    watcher.call(detach)
    after = rb.stats()
    assert [row["pid"] for row in after["processes"]] == [row["pid"] for row in before["processes"]]
    assert len(os.listdir("/proc/self/fd")) == files
    assert rb.storage._is_alone()  # it may still give its memory back when it is emptied


def test_it_goes_on_when_the_buffer_is_emptied_and_takes_new_memory(watcher: Child) -> None:
    rb = buffer_of(episode(10))
    watcher.call(attach, rb.handle)
    rb.empty()
    rb.extend(episode(40))
    assert watcher.call(read)["return_max"] == 40.0


def test_a_buffer_in_a_file(watcher: Child, tmp_path: Path) -> None:
    rb = buffer_of(episode(10), path=tmp_path / "buffer")
    rb.sample()
    watcher.call(attach, 0, tmp_path / "buffer")
    assert watcher.call(read)["samples"] == 8


def test_an_engine(watcher: Child) -> None:
    with engine_of_producers() as engine:
        engine.sample_batch(4, 4)
        assert watcher.call(attach, engine.handle)[0]
        seen = watcher.call(read)
        assert (seen["state"], seen["samples"], len(seen["workers"])) == ("READY", 4, 1)
    assert watcher.call(read)["state"] == "STOPPED"


def engine_of_workers() -> OnlineDataEngine:
    """Return an engine whose only worker is a process."""
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=4,
            max_episode_steps=20,
            gym_config={"id": "CartPole-v1"},
            policy="random",
            start_method="fork",
            progress_bar=False,
        )
    )


def test_what_has_changed_is_seen_between_two_looks() -> None:
    with engine_of_producers() as engine:
        source = Source(engine)
        first = source.read()
        assert not source.has_changed
        assert list(source.changes(0.0)) == []
        engine.sample_batch(4, 4)
        assert not source.has_changed  # figures wait for the next look
        assert source.glance().rates == first.rates
        engine.stop()
        assert source.has_changed
        (reading,) = source.changes(0.15)
        assert reading.stats["state"] == "STOPPED"


def test_a_process_that_has_ended() -> None:
    owner, watcher = Child("fork", None), Child("fork", {})
    watcher.call(attach, owner.call(keep_a_buffer))
    owner.process.kill()
    owner.process.join()
    with pytest.raises(SharingError, match="has ended"):
        watcher.call(read)
    watcher.end()


KEPT: list[Any] = []


def keep_a_buffer(given: None) -> str:
    """Return the handle of the buffer: a forked process has those of its parent, too."""
    KEPT.append(buffer_of(episode()))
    return KEPT[-1].handle


def test_what_cannot_be_watched(watcher: Child) -> None:
    with pytest.raises(SharingError, match="no process"):
        watcher.call(attach, 2**22 + 1)
    with pytest.raises(InvalidArgumentError, match="one of them"):
        Source.attach(1, "somewhere")
    with pytest.raises(InvalidArgumentError, match="can be watched"):
        Source("buffer")  # type: ignore[arg-type]


def have_an_engine(kept: dict[str, Any]) -> tuple[str, str]:
    """Return its handle and that of its buffer."""
    kept["buffer"], kept["engine"] = buffer_of(episode()), engine_of_producers()
    kept["engine"].start()
    return kept["engine"].handle, kept["engine"].replay_buffer.handle


def end_the_engine(kept: dict[str, Any]) -> None:
    kept["engine"].stop()


def have_two_buffers(kept: dict[str, Any]) -> None:
    kept["buffers"] = make_buffer(), make_buffer()


def command(kept: dict[str, Any], *arguments: str) -> tuple[int, str]:
    output = io.StringIO()
    with redirect_stdout(output):
        code = main(arguments)
    return code, output.getvalue()


@pytest.fixture
def owner() -> Iterator[Child]:
    """A process that inherits nothing: it has what a test gives it, and no engine or buffer of an earlier test."""
    child = Child("spawn", {})
    yield child
    child.end()


def test_which_ones_run(owner: Child) -> None:
    engine, its_buffer = owner.call(have_an_engine)
    found = [each for each in running() if each.pid == owner.process.pid]
    assert sorted(each.kind for each in found) == ["buffer", "engine"]
    assert engine in {each.handle for each in found}
    assert its_buffer not in {each.handle for each in found}
    code, output = command({}, "ps")
    assert code == 0
    (line,) = [line for line in output.splitlines() if line.startswith(f"{owner.process.pid} ") and " engine " in line]
    assert "READY" in line
    owner.call(end_the_engine)


class TestTerminal:
    def test_one_look(self, watcher: Child) -> None:
        pytest.importorskip("rich")
        rb = buffer_of(episode(10), episode(20, task="place"))
        rb.sample()
        code, output = watcher.call(command, "watch", "--pid", rb.handle, "--once", "--every", "0.1")
        assert code == 0
        assert "trajectories" in output
        assert "learner" in output
        assert str(os.getpid()) in output

    def test_answers(self) -> None:
        rb = buffer_of()
        assert {v.subject: v.level for v in verdicts(Source(rb).read())} == {"learner": "warning", "data": "warning"}
        rb.extend(episode())
        rb.sample()
        found = {verdict.subject: verdict.text for verdict in verdicts(Source(rb).read())}
        assert "sampled at an age of" in found["data"]
        assert "of its time for data" in found["learner"]


class TestPrometheus:
    def test_what_it_serves(self) -> None:
        client = pytest.importorskip("prometheus_client.parser")
        rb = buffer_of(episode(10), episode(20, task="place", success=False))
        rb.sample()
        with serve_prometheus(rb, port=0) as server:
            text = urllib.request.urlopen(server.url).read().decode()
            assert server.url.startswith("http://127.0.0.1:")
        found = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in client.text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["embodichain_rl_up",] == 1.0
        assert found["embodichain_rl_inserted_total",] == 2.0
        assert found["embodichain_rl_samples_total",] == 8.0
        assert found["embodichain_rl_success_by_task_ratio", "lift"] == 1.0
        assert found["embodichain_rl_sampled_age_seconds_count",] == 8.0
        assert found["embodichain_rl_process_samples_total", str(os.getpid())] == 8.0

    def test_of_a_buffer_that_is_gone(self, watcher: Child) -> None:
        pytest.importorskip("prometheus_client")
        owner = Child("fork", None)
        with serve_prometheus(Source.attach(owner.call(keep_a_buffer)), port=0) as server:
            assert b"embodichain_rl_up 1.0" in urllib.request.urlopen(server.url).read()
            owner.process.kill()
            owner.process.join()
            assert b"embodichain_rl_up 0.0" in urllib.request.urlopen(server.url).read()

    def test_the_dashboard_shows_metrics_that_there_are(self) -> None:
        dashboard = Path(__file__).parents[2] / "docs/grafana_dashboard.json"
        content = json.loads(dashboard.read_text())
        names = {prometheus_name(metric) for metric in METRICS} | {
            "embodichain_rl_up",
            "embodichain_rl_sampled_age_seconds_bucket",
            "embodichain_rl_worker_steps_per_second",
            "embodichain_rl_worker_seconds_since_heartbeat",
        }
        expressions = [target["expr"] for panel in content["panels"] for target in panel.get("targets", [])]
        assert expressions
        for expression in expressions:
            used = {word for word in expression.replace("(", " ").replace("[", " ").split() if "embodichain" in word}
            used = {word.strip(")]{},") for word in used}
            assert used <= names


def test_a_trace(tmp_path: Path) -> None:
    rb = buffer_of(episode())
    child = Child("fork", rb)
    child.begin(sample_until, str(tmp_path / "end"))
    number = trace(rb, tmp_path / "trace.json", seconds=0.5)
    (tmp_path / "end").touch()
    child.result()
    child.end()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == number
    samples = [event for event in events if event["name"] == "sample" and event["ph"] == "X"]
    assert samples
    assert all(event["dur"] > 0 for event in samples)
    assert any(event["ph"] == "C" and event["name"] == "trajectories" for event in events)


def sample_until(rb: TrajectoryReplayBuffer, end: str) -> None:
    while not Path(end).exists():
        rb.sample()


def test_the_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--seconds", "0.3"])
    output = capsys.readouterr().out
    assert "none torn" in output
    assert (code == 0) == ("all is well" in output) == ("PROBLEM" not in output)


def test_a_start_says_what_it_does_in_a_log_file(capfd: pytest.CaptureFixture[str]) -> None:
    cfg = engine_of_producers().cfg.replace(progress_bar=True, producers=[iter([episode() for _ in range(8)])])
    with OnlineDataEngine(cfg):
        pass
    shown = capfd.readouterr().err
    assert "Filling the buffer: 4 of 4 trajectories" in shown
    assert "\r" not in shown


def test_nothing_in_memory_is_watched_by_default_if_there_are_several(owner: Child) -> None:
    owner.call(have_two_buffers)
    code, _ = command({}, "watch", "--pid", str(owner.process.pid), "--once")
    assert code == 1


def read_to_the_end(terminal: int) -> str:
    """Return what was written to a pseudo terminal whose other end is closed. One read may return a part of it."""
    parts = []
    with suppress(OSError):  # there is nothing left
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_start_is_one_line_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        cfg = engine_of_producers().cfg.replace(progress_bar=True, producers=[iter([episode() for _ in range(8)])])
        with OnlineDataEngine(cfg):
            pass
        monkeypatch.undo()
    shown = read_to_the_end(master)
    os.close(master)
    assert "Filling the buffer: 100%" in shown
    assert "1 collecting" in shown
    assert shown.count("\n") == 1
    assert shown.count("\r") > 1
