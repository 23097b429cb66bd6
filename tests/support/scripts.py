"""Scripts that run without a new interpreter: in a process that is forked from the server with all imports loaded."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from waiting import PATIENCE_WITH_SCRIPTS, wait_until

SUPPORT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """The exit code and the output of a script that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: Path, *arguments: str, directory: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run a script as ``python script *arguments`` does, wait for its end and for that of all processes it started.

    It has a process and a ``__main__`` of its own. The default start method is "forkserver" there, so its workers have
    all imports loaded too; as with "spawn", each of them imports the script and inherits nothing else.

    Args:
        script: its path.
        arguments: the rest of its command line.
        directory: an existing directory for its output.
        environment: environment variables that it has in addition.
    """
    stdout, stderr = directory / "stdout", directory / "stderr"
    for path in (stdout, stderr):
        path.write_text("")  # the directory may be that of an earlier run
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run, args=(script, arguments, stdout, stderr, environment or {}))
    process.start()
    assert process.pid is not None
    server = _parent(process.pid)
    before = _children(server) - {process.pid}

    try:
        wait_until(
            lambda: process.exitcode is not None,
            lambda: f"{script.name}, which has printed:\n{stdout.read_text()}{stderr.read_text()}\nIts end",
            timeout=PATIENCE_WITH_SCRIPTS,
        )
        wait_until(lambda: _children(server) <= before, lambda: f"The end of {_children(server) - before}")
    finally:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Outcome(process.exitcode, stdout.read_text(), stderr.read_text())


def reuse_fork_server() -> None:
    """Let a process that was forked from the server use that server too.

    The documentation of ``ensure_running`` in multiprocessing says that it does. But it starts another server, which
    imports everything again.
    """
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = multiprocessing.resource_tracker.ensure_running


def _run(script: Path, arguments: tuple[str, ...], stdout: Path, stderr: Path, environment: Mapping[str, str]) -> None:
    redirect(stdout, stderr)
    multiprocessing.set_start_method("forkserver", force=True)
    reuse_fork_server()
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    # Without the folders of tests: one of them has the name of a library.
    others = [path for path in sys.path if not Path(path).resolve().is_relative_to(SUPPORT.parent)]
    sys.path[:] = [str(script.parent), *others, str(SUPPORT)]
    # Workers import the main file. Those of the server would write where the server does.
    file = stdout.parent / "main_of_workers.py"
    file.write_text(
        "from pathlib import Path\n"
        "from scripts import redirect\n"
        f"redirect(Path({str(stdout)!r}), Path({str(stderr)!r}))\n"
        f"__file__ = {str(script)!r}\n"
        "exec(compile(open(__file__).read(), __file__, 'exec'))\n"
    )
    main = _Main("__main__", file)
    main.__dict__["__file__"] = str(script)
    sys.modules["__main__"] = main
    exec(compile(script.read_text(), script, "exec"), main.__dict__)


class _Main(ModuleType):
    """A main module that multiprocessing finds in another file than its code does."""

    def __init__(self, name: str, file: Path) -> None:
        super().__init__(name)
        self.__dict__["_file_of_workers"] = str(file)

    @property
    def __file__(self) -> str:
        return self.__dict__["_file_of_workers"]


def redirect(stdout: Path, stderr: Path) -> None:
    """Let this process append its output to files."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _children(server: int) -> set[int]:
    return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == server}


def _parent(pid: int) -> int:
    """Return the id of the parent of a process, or -1 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
