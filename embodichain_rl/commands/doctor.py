"""``embodichain-rl doctor``: is this machine, and this installation, fit?"""

from __future__ import annotations

from embodichain_rl.monitor.doctor import examine

__all__ = ["COMMAND"]

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def doctor(seconds: float = 5.0) -> int:
    """Check this machine and the installation, and test the buffer for some seconds. The exit code says if all is well.

    Args:
        seconds: of the self-test; 0 for none.
    """
    problems = 0
    for finding in examine(seconds):
        print(f"{MARKS[finding.level]}  {finding.subject:<16} {finding.text}", flush=True)
        problems += finding.level == "problem"
    print("all is well" if not problems else f"{problems} to mend")
    return 1 if problems else 0


COMMAND = doctor
