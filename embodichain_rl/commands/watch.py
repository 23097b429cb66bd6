"""``embodichain-rl watch``: see what an engine or a buffer does, in the terminal, the browser, or for Prometheus."""

from __future__ import annotations

import time
from pathlib import Path

from embodichain_rl.monitor.source import Source

__all__ = ["COMMAND"]


def watch(
    pid: str | None = None,
    path: Path | None = None,
    every: float = 1.0,
    once: bool = False,
    web: bool = False,
    prometheus: bool = False,
    port: int = 0,
    browser: bool = True,
) -> int:
    """See what a running engine or buffer does. It is only read, and does not notice.

    Without ``--pid`` and ``--path``, the only one of this user is watched; ``embodichain-rl ps`` lists them.

    Args:
        pid: the process that has it, or a handle (``engine.handle``, ``rb.handle``).
        path: the directory of a buffer in a file.
        every: seconds between two looks.
        once: print one view, and end.
        web: serve a page with live charts and a look into the buffer, and print its address.
        prometheus: serve the figures to Prometheus, and print the address.
        port: of the page or of Prometheus; by default one that is free, and 9464 for Prometheus.
        browser: open the page in a browser.
    """
    source = Source.attach(pid, path)
    if prometheus:
        from embodichain_rl.monitor.prometheus import serve_prometheus

        with serve_prometheus(source, port or 9464) as server:
            print(server.url, flush=True)
            return _until_it_ends(source)
    if web:
        from embodichain_rl.monitor.web import serve_web

        with serve_web(source, port, every=every) as page:
            print(page.url, flush=True)
            if browser:
                page.open()
            return _until_it_ends(source)
    from embodichain_rl.monitor.terminal import watch_terminal

    return watch_terminal(source, every=every, once=once)


def _until_it_ends(source: Source) -> int:
    try:
        while source.is_alive:
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    print(f"Process {source.pid} has ended.")
    return 0


COMMAND = watch
