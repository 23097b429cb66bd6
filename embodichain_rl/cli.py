"""The command line, ``embodichain-rl``. Each command is a module of ``commands``, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from embodichain_rl.errors import EmbodiChainRLError

__all__ = ["main"]

PROGRAM = "embodichain-rl"

COMMANDS = {
    "demo": "sample from a live simulator for a few seconds",
    "bench": "measure sample() and extend() on this machine, beside TorchRL's",
    "buffer": "look at a buffer in a file, also while it is in use",
    "doctor": "check this machine and the installation, with a self-test of five seconds",
    "ps": "list the running engines and buffers of this user",
    "trace": "record what workers and learners do for some seconds, for Perfetto or Chrome",
    "watch": "see what an engine or a buffer does: in the terminal, the browser, or for Prometheus",
}
"""The name of each command, which is also that of its module, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 if it failed, 2 for wrong arguments.

    Args:
        arguments: those of the command line, without the name of the program; by default those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        print(f"{PROGRAM}: there is no command {name!r}.\n\n{_help()}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    about = "Live trajectory streaming for robot learning."
    return "\n".join([f"usage: {PROGRAM} COMMAND ...", "", about, "", "commands:", *lines, "", _HINT])


_HINT = f"`{PROGRAM} COMMAND --help` shows the arguments of a command."


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run a command: the function ``COMMAND`` of its module, or one of several, by name; tyro reads the arguments."""
    import tyro

    command = importlib.import_module(f"embodichain_rl.commands.{name}").COMMAND
    program = f"{PROGRAM} {name}"
    try:
        if isinstance(command, dict):
            result = tyro.extras.subcommand_cli_from_dict(
                command, prog=program, description=COMMANDS[name], args=arguments
            )
        else:
            result = tyro.cli(command, prog=program, args=arguments)
    except (EmbodiChainRLError, AssertionError, OSError) as error:
        print(f"{PROGRAM}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
