"""The terminal view, by rich (extra ``watch``): one screen, redrawn in place."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from embodichain_rl.engine.state import DOING
from embodichain_rl.errors import SharingError
from embodichain_rl.monitor.extras import needing
from embodichain_rl.monitor.source import Reading, Source
from embodichain_rl.monitor.verdicts import duration, verdicts

__all__ = ["History", "view", "watch_terminal"]

COLORS = {"good": "green", "warning": "yellow", "bad": "bold red"}
MARKS = {"good": "●", "warning": "▲", "bad": "✖"}
BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = 40
"""The number of readings in a curve."""

ERRORS = 8
"""The number of lost workers whose last error is shown."""

PROCESSES = 8
"""The number of processes that are shown, those that were active last."""


class History:
    """The last values of what is drawn as a curve."""

    def __init__(self) -> None:
        self.curves: dict[str, deque[float]] = {}

    def add(self, reading: Reading) -> None:
        """Add a reading."""
        for name, value in reading.rates.items():
            self.curves.setdefault(name, deque(maxlen=SHOWN)).append(value)

    def sparkline(self, name: str) -> str:
        """Return a curve as a row of blocks, from 0 to its largest value."""
        values = self.curves.get(name, ())
        most = max(values, default=0.0)
        if most <= 0.0:
            return BLOCKS[0] * len(values)
        return "".join(BLOCKS[min(7, int(8 * value / most))] for value in values)


def view(source: Source, reading: Reading, history: History) -> Any:
    """Return what is shown of a reading, for rich to print.

    Args:
        source: what is watched.
        reading: what was seen.
        history: the readings before.
    """
    console, table, text = (needing("watch", f"rich.{name}") for name in ("console", "table", "text"))
    panel = needing("watch", "rich.panel").Panel
    stats = reading.stats
    kind = "engine" if source.is_engine else "buffer"
    head = text.Text()
    head.append(f"{kind} {source.title}".strip(), "bold")
    head.append(f"   process {source.pid}" if source.pid is not None else "", "dim")
    state = stats.get("state")
    if state:
        head.append(f"   {state}", "green" if state == "READY" else "yellow" if state == "STARTING" else "red")
    answers = table.Table.grid(padding=(0, 1))
    for verdict in verdicts(reading):
        color = COLORS[verdict.level]
        answers.add_row(text.Text(MARKS[verdict.level], color), text.Text(verdict.subject, "bold"), verdict.text)
    boxes = [
        panel(_flow(table, reading, history), title="flow", title_align="left", border_style="dim"),
        panel(_held(table, stats), title="in the buffer", title_align="left", border_style="dim"),
        panel(_ages(table, stats), title="what was sampled", title_align="left", border_style="dim"),
    ]
    columns = needing("watch", "rich.columns").Columns(boxes, expand=False)
    parts = [head, answers, columns]
    if stats.get("workers"):
        parts += [_workers(table, text, stats), *_errors(text, stats)]
    parts.append(_processes(table, text, stats))
    return console.Group(*parts)


def _grid(table: Any, rows: list[tuple[str, str]]) -> Any:
    grid = table.Table.grid(padding=(0, 1))
    grid.add_column(style="dim")
    grid.add_column(justify="right")
    for row in rows:
        grid.add_row(*row)
    return grid


def _flow(table: Any, reading: Reading, history: History) -> Any:
    rates, stats = reading.rates, reading.stats
    grid = table.Table.grid(padding=(0, 1))
    grid.add_column(style="dim")
    grid.add_column(justify="right")
    grid.add_column(style="cyan")
    for label, name, unit in (("inserts", "inserts", "/s"), ("steps", "steps", "/s"), ("samples", "samples", "/s")):
        value = rates.get(name)
        grid.add_row(label, "–" if value is None else f"{value:,.1f}{unit}", history.sparkline(name))
    waits = rates.get("starvation")
    grid.add_row("learner waits", "–" if waits is None else f"{waits:.0%}", history.sparkline("starvation"))
    per_insert = stats["samples_per_insert"]
    grid.add_row("samples per insert", "–" if per_insert is None else f"{per_insert:,.1f}", "")
    grid.add_row("in sample() / between", f"{duration(stats['data_s'])} / {duration(stats['updt_s'])}", "")
    return grid


def _held(table: Any, stats: dict[str, Any]) -> Any:
    filled = round(20 * min(1.0, stats["fill"]))
    rows = [
        (f"{'█' * filled}{'░' * (20 - filled)}", f"{stats['fill']:.0%}"),
        ("trajectories", f"{stats['trajectories']:,}"),
        ("steps", f"{stats['steps']:,}"),
        ("data", f"{stats['bytes'] / 2**20:,.1f} MiB"),
        ("lengths", _range(stats, "length")),
        ("returns", _range(stats, "return")),
    ]
    if stats["success_rate"] is not None:
        rows.append(("success", f"{stats['success_rate']:.0%}"))
    rows += [(f"  {task}"[:24], f"{share:.0%}") for task, share in list(stats["success_by_task"].items())[:6]]
    return _grid(table, rows)


def _range(stats: dict[str, Any], name: str) -> str:
    if stats[f"{name}_mean"] is None:
        return "–"
    low, mean, high = (stats[f"{name}_{which}"] for which in ("min", "mean", "max"))
    return f"{low:,.4g} – {high:,.4g}, mean {mean:,.4g}"


def _ages(table: Any, stats: dict[str, Any]) -> Any:
    sampled = stats["sampled"]
    age = " / ".join(duration(sampled[f"age_{which}"]) for which in ("mean", "p95", "max"))
    rows = [("age mean / 95 % / max", age)]
    if sampled["policy_lag_mean"] is not None:
        lag = f"{sampled['policy_lag_mean']:.1f} / {sampled['policy_lag_p95']:.0f} / {sampled['policy_lag_max']}"
        rows.append(("policy lag mean / 95 % / max", lag))
    if stats["padding_fraction"]:
        rows.append(("padding", f"{stats['padding_fraction']:.1%}"))
    rows.append(("drawn again", f"{stats['redrawn_total']:,}"))
    for group, share in list(stats["mixture_asked"].items())[:6]:
        rows.append((f"{group}"[:24], f"{stats['mixture_drawn'].get(group, 0.0):.0%} of {share:.0%} asked"))
    return _grid(table, rows)


def _workers(table: Any, text: Any, stats: dict[str, Any]) -> Any:
    shown = table.Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("worker", "process", "phase", "steps/s", "steps", "episodes", "rejected", "restarts", "heartbeat"):
        shown.add_column(name, justify="left" if name in ("worker", "phase") else "right", no_wrap=True)
    for index, worker in enumerate(stats["workers"]):
        silent = worker["seconds_since_heartbeat"]
        rate = worker["steps_per_second"]
        phase = "held" if worker["held"] else PHASES[worker["phase"]]
        shown.add_row(
            str(index),
            str(worker["pid"] or "–"),
            text.Text(phase, "green" if worker["phase"] == "acting" else "yellow"),
            "–" if rate is None else f"{rate:,.0f}",
            f"{worker['steps']:,}",
            f"{worker['trajectories']:,}",
            f"{worker['rejected']:,}",
            text.Text(str(worker["restarts"]), "yellow" if worker["restarts"] else ""),
            text.Text(f"{duration(silent)} ago" if worker["pid"] else "–", "red" if silent > 2.0 else ""),
        )
    return shown


def _errors(text: Any, stats: dict[str, Any]) -> list[Any]:
    """Return a line for each worker that was lost: in a column of the table, errors would take the room of the rest."""
    return [
        text.Text(f"worker {index}, last error: {worker['last_error']}", "red", no_wrap=True, overflow="ellipsis")
        for index, worker in enumerate(stats["workers"])
        if worker["last_error"]
    ][:ERRORS]


PHASES = {phase.name.lower(): text for phase, text in DOING.items()}
"""What a worker does in each phase."""


def _processes(table: Any, text: Any, stats: dict[str, Any]) -> Any:
    shown = table.Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("process", "inserted", "pending", "extend()", "batches", "sample()", "between", "waits", "last use"):
        shown.add_column(name, justify="left" if name == "process" else "right", no_wrap=True)
    rows = sorted(stats["processes"], key=lambda row: row["seconds_since_use"] or 0.0)
    for row in rows[:PROCESSES]:
        shown.add_row(
            text.Text(f"{row['pid']}" + ("" if row["alive"] else " (ended)"), "" if row["alive"] else "dim"),
            f"{row['inserted']:,}",
            f"{row['pending_trajectories']:,}",
            duration(row["extend_s"]),
            f"{row['batches']:,}",
            duration(row["data_s"]),
            duration(row["updt_s"]),
            "–" if row["starvation"] is None else f"{row['starvation']:.0%}",
            f"{duration(row['seconds_since_use'])} ago" if row["seconds_since_use"] is not None else "–",
        )
    if len(rows) > PROCESSES:
        shown.add_row(f"and {len(rows) - PROCESSES} more")
    return shown


def watch_terminal(source: Source, *, every: float = 1.0, once: bool = False) -> int:
    """Show a source until Ctrl-C, or until its process ends; return the exit code.

    Args:
        source: what is watched.
        every: seconds between two looks.
        once: whether to look twice, a moment apart, and print the view.
    """
    console = needing("watch", "rich.console").Console()
    live = needing("watch", "rich.live").Live
    history = History()
    history.add(source.read())
    if once or not console.is_terminal:
        time.sleep(min(every, 1.0))
        reading = source.read()
        history.add(reading)
        console.print(view(source, reading, history))
        if once:
            return 0
    try:
        with live(console=console, screen=console.is_terminal, auto_refresh=False) as shown:
            while True:
                reading = source.read()
                history.add(reading)
                shown.update(view(source, reading, history), refresh=True)
                for changed in source.changes(every):
                    shown.update(view(source, changed, history), refresh=True)
    except KeyboardInterrupt:
        return 0
    except SharingError as error:
        console.print(str(error))
        return 0
