"""The page in a real browser: what it shows, and whom it refuses."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, Browser
from test_metrics import buffer_of
from test_pictures import filmed
from test_watching import engine_of_workers

from embodichain_rl import TrajectoryReplayBuffer

pytest.importorskip("nicegui")
websockets = pytest.importorskip("websockets.sync.client")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    rb = buffer_of(filmed(12), filmed(20))
    rb.sample()
    return rb


@contextmanager
def page_of(handle: str, every: float) -> Iterator[str]:
    """Let another process serve the page of a buffer or an engine of this one; yield its address."""
    arguments = ["watch", "--pid", handle, "--web", "--no-browser", "--every", str(every)]
    process = subprocess.Popen(
        [sys.executable, "-m", "embodichain_rl.cli", *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), address
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def url(rb: TrajectoryReplayBuffer) -> Iterator[str]:
    """The address of a page over the buffer."""
    with page_of(rb.handle, 0.2) as address:
        yield address


def status(url: str, *, path: str = "", **headers: str) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port)
    connection.request("GET", path or f"/?{parts.query}", headers=headers)
    return connection.getresponse().status


def test_who_is_let_in(url: str) -> None:
    port = urlsplit(url).port
    assert status(url) == 200
    assert status(url, Host=f"localhost:{port}") == 200
    assert status(url, Origin=f"http://127.0.0.1:{port}") == 200
    assert status(url, path="/") == 403
    assert status(url, path="/?token=wrong") == 403
    assert status(url, path="/_nicegui_ws/socket.io/?EIO=4&transport=polling") == 403
    assert status(url, Host="evil.example") == 403
    assert status(url, Origin="http://evil.example") == 403
    socket = f"ws://127.0.0.1:{port}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    token = urlsplit(url).query
    with pytest.raises(Exception, match="403"):
        websockets.connect(socket)
    with pytest.raises(Exception, match="403"):
        websockets.connect(f"{socket}&{token}", origin="http://evil.example")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_what_it_shows(url: str, rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.go(url)
        browser.wait_for("document.body && document.body.innerText.includes('2 trajectories')")
        text = browser.text()
        assert "learner" in text
        assert str(os.getpid()) in text
        browser.wait_for("document.querySelectorAll('canvas').length >= 8")  # six charts, curves, the map
        browser.wait_for("document.body.innerText.includes('step 0 of 20')")
        browser.wait_for("[...document.images].some(image => image.alt == 'film strip' && image.naturalWidth > 0)")
        assert "lift" in browser.text()
        rb.extend(filmed(30))
        browser.wait_for("document.body.innerText.includes('3 trajectories')")
        browser.value("[...document.querySelectorAll('button')].find(b => b.innerText == 'newest').click()")
        browser.wait_for("document.body.innerText.includes('step 0 of 30')")
        assert browser.value("document.body.scrollWidth <= window.innerWidth")
        assert browser.console == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    # The page looks once an hour: what is seen of a loss does not wait for that.
    with engine_of_workers() as engine, page_of(engine.handle, 3600.0) as url, Browser(tmp_path) as browser:
        browser.go(url)
        browser.wait_for("document.body && document.body.innerText.includes('1 of 1 collect')")
        pid = engine.stats()["workers"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        browser.wait_for("document.body.innerText.includes('1 of 1 collect; replaced: 1 (last: worker 0)')")
        assert f"WorkerDiedError: worker 0 (process {pid}) was killed by signal 9" in browser.text()
