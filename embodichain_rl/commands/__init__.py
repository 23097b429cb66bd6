"""The commands of ``embodichain-rl``: one module each, which ``cli.py`` imports when the command is called.

``COMMAND`` of a module is a function, or a dict of functions by the name of the subcommand. tyro makes the arguments
from their signatures, and the help from their docstrings. A function returns the exit code; None means 0. An error of
the library, an ``OSError`` or an ``AssertionError`` is printed, and the exit code is 1.
"""
