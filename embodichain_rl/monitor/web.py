"""The page of ``embodichain-rl watch --web``: a server on the loopback interface, by NiceGUI (extra ``watch``)."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
import warnings
import webbrowser

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import UnsupportedOperationError
from embodichain_rl.monitor.extras import needing
from embodichain_rl.monitor.gate import Gate
from embodichain_rl.monitor.source import Source, Watchable, watched

__all__ = ["WebPage", "serve_web"]

START_TIMEOUT = 60.0
"""Seconds that the server may take to start."""


class WebPage:
    """A running page.

    Attributes:
        url (str): its address, with the token. Who has it sees the page.
        port (int): its port.
    """

    _serving = False

    def __init__(self, source: Source, port: int, every: float) -> None:
        if WebPage._serving:
            raise UnsupportedOperationError("A process serves one page; close the other one first.")
        nicegui, uvicorn = needing("watch", "nicegui"), needing("watch", "uvicorn")
        fastapi = needing("watch", "fastapi")
        from embodichain_rl.monitor.page import Page

        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        token = secrets.token_urlsafe(24)
        self.url = f"http://127.0.0.1:{self.port}/?token={token}"
        app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        page = Page(source, every)
        nicegui.ui.run_with(
            app, root=page.build, title="embodichain-rl", dark=None, reconnect_timeout=30.0, show_welcome_message=False
        )
        config = uvicorn.Config(
            Gate(app, token), log_level="error", lifespan="on", ws_ping_interval=20.0, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None
        self._thread = threading.Thread(target=self._run, name="embodichain-rl-web", daemon=True)
        WebPage._serving = True
        with warnings.catch_warnings():
            # NiceGUI looks at every object of the process for its server, also at deprecated ones of torch.
            warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
            self._start()

    def _start(self) -> None:
        self._thread.start()
        begin = time.monotonic()
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() - begin > START_TIMEOUT:
                self.close()
                raise OSError("The server of the page could not be started.")
            time.sleep(0.02)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def open(self) -> None:
        """Open the page in a browser, if there is one."""
        webbrowser.open(self.url)

    def close(self) -> None:
        """End the server."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5.0)
        self._socket.close()
        WebPage._serving = False

    def __enter__(self) -> WebPage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_web(engine_or_buffer: Watchable | Source, port: int = 0, *, every: float = 1.0) -> WebPage:
    """Serve a page with live charts and a look into the buffer, on a thread, on the loopback interface only.

    The address has a token, without which nothing is shown, and requests of other origins are refused. From another
    machine, use ``ssh -L PORT:127.0.0.1:PORT``. The page only reads.

    Args:
        engine_or_buffer: of this process, or a :class:`Source` that is attached to another one.
        port: the port; 0 for one that is free.
        every: seconds between two looks.

    Raises:
        MissingPackageError: without NiceGUI.
        OSError: if the port is in use.
        UnsupportedOperationError: if this process serves a page already.
    """
    return WebPage(watched(engine_or_buffer), port, checked_float("every", every, minimum=0.1))
