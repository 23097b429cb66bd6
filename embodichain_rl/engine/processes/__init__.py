"""How the engine starts child processes, talks to them and ends them; threads that wait for work.

Knows nothing of environments, policies or buffers. Begin with ``child.py``, then ``foreground.py``,
which explains what a signal to the whole job reaches.
"""

from embodichain_rl.engine.processes.child import ChildProcess
from embodichain_rl.engine.processes.foreground import (
    MARK,
    end_process_group,
    kill_marked,
    leave_foreground,
    starting_processes,
)
from embodichain_rl.engine.processes.idle_threads import IdleThreads, Job
from embodichain_rl.engine.processes.interruptible import run_interruptibly
from embodichain_rl.engine.processes.remote_errors import pack_exception, unpack_exception

__all__ = [
    "MARK",
    "ChildProcess",
    "IdleThreads",
    "Job",
    "end_process_group",
    "kill_marked",
    "leave_foreground",
    "pack_exception",
    "run_interruptibly",
    "starting_processes",
    "unpack_exception",
]
