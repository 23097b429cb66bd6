"""The content of the web page: answers, live charts, workers, and a look into a trajectory."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from nicegui import run, ui

from embodichain_rl.errors import EmbodiChainRLError
from embodichain_rl.monitor.charts import AMBER, BLUE, GREEN, INK, PURPLE, curves, heat_map, lines
from embodichain_rl.monitor.looking import Look, look_at
from embodichain_rl.monitor.source import Reading, Source
from embodichain_rl.monitor.terminal import PHASES
from embodichain_rl.monitor.verdicts import duration, verdicts

__all__ = ["Page"]

NOTICE_EVERY = 0.25
"""Seconds between two checks of whether there is something new to show."""

KEPT = 600
"""Readings that are kept for the curves; the memory of the page does not grow beyond them."""

OFFERED = 200
"""The newest trajectories that can be picked."""

FIT = """
for (const id of %s) {
  const drawn = getElement(id);
  if (drawn?.chart && drawn.chart.getWidth() !== drawn.$el.clientWidth) drawn.chart.resize();
}
"""
"""Fits charts to the page: one that is made before the styles of the page are there takes what width it finds."""

ICONS = {"good": ("check_circle", "#16a34a"), "warning": ("warning", "#d97706"), "bad": ("error", "#dc2626")}
CARD = "w-full gap-1 shadow-none border border-gray-300 dark:border-gray-700"
GRID = "w-full grid grid-cols-1 md:grid-cols-2 xl:grid-cols-3 gap-3"


class Page:
    """What every client of the page shares: the source, and the last readings.

    Args:
        source: what is watched.
        every: seconds between two looks.
    """

    def __init__(self, source: Source, every: float) -> None:
        self.source, self.every = source, every
        self.readings: deque[tuple[float, dict[str, float]]] = deque(maxlen=KEPT)
        self.newest: Reading | None = None
        self.ended = ""
        self._lock = threading.Lock()
        self._looked_at = 0.0

    def look(self) -> Reading | None:
        """Return the newest reading; read the source if it is time to, or if a worker was lost."""
        with self._lock:
            is_time = time.monotonic() - self._looked_at >= 0.9 * self.every
            if self.ended or not (is_time or self.source.has_changed):
                return self.newest
            try:
                self.newest = reading = self.source.read() if is_time else self.source.glance()
            except EmbodiChainRLError as error:
                self.ended = str(error)
                return self.newest
            if is_time:
                self._looked_at = time.monotonic()
                self.readings.append((reading.at, _values(reading)))
            return reading

    def ids(self) -> list[int]:
        """Return the ids of the newest live trajectories, the newest first."""
        with self._lock:
            return self.source.buffer.storage.ledger.live_rows().ids[::-1][:OFFERED].tolist()

    def trajectory(self, number: int) -> Look:
        """Return what there is to see in a trajectory."""
        with self._lock:
            return look_at(self.source.buffer.storage, number)

    def build(self) -> None:
        """Build the page of one client."""
        _Client(self)


def _values(reading: Reading) -> dict[str, float]:
    stats, sampled = reading.stats, reading.stats["sampled"]
    values = {
        **reading.rates,
        "fill": stats["fill"],
        "age_mean": sampled["age_mean"],
        "age_p95": sampled["age_p95"],
        "lag_mean": sampled["policy_lag_mean"],
        "return_mean": stats["return_mean"],
        "success_rate": stats["success_rate"],
    }
    return {name: float(value) for name, value in values.items() if value is not None}


CHARTS = (
    ("inserts and samples, 1/s", (("inserts", "trajectories", BLUE), ("samples", "chunks", AMBER)), True, None),
    ("the learner waits for data", (("starvation", "share of its time", AMBER),), False, 1.0),
    ("age of what is sampled, s", (("age_mean", "mean", BLUE), ("age_p95", "95 %", PURPLE)), False, None),
    ("policy lag of what is sampled, versions", (("lag_mean", "mean", PURPLE),), False, None),
    ("mean return of the newest trajectories", (("return_mean", "return", GREEN),), False, None),
    ("fill of the buffer, success rate", (("fill", "fill", BLUE), ("success_rate", "success", GREEN)), False, 1.0),
)
"""The charts: the title; name, label and color of each curve; whether the scale is logarithmic; the upper end."""


class _Client:
    """The elements of the page in one browser."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.look: Look | None = None
        self.frames: dict[str, Any] = {}
        self.chart: Any = None
        self.shown: tuple[float, str] | None = None
        ui.colors(primary=BLUE)
        ui.query(".nicegui-content").classes("p-3 md:p-5 gap-3 max-w-screen-2xl mx-auto")
        with ui.row().classes("items-baseline gap-3 w-full"):
            self.title = ui.label().classes("text-xl font-semibold")
            self.state = ui.label().classes("text-sm font-medium")
            self.about = ui.label().classes("text-sm").style(f"color:{INK}")
        self.answers = ui.row().classes("w-full gap-3").mark("answers")
        with ui.element("div").classes(GRID):
            self.charts = []
            for title, series, logarithmic, most in CHARTS:
                with ui.card().classes(CARD):
                    ui.label(title).classes("text-sm font-medium")
                    options = lines(series, logarithmic=logarithmic, most=most)
                    self.charts.append((series, ui.echart(options).style("width:100%;height:176px")))
        self._build_tables()
        self._build_look()
        ui.timer(min(page.every, NOTICE_EVERY), self.refresh)

    def _build_tables(self) -> None:
        if self.page.source.is_engine:
            self.workers = self._table(
                "workers",
                ("worker", "process", "phase", "steps/s", "steps", "episodes", "rejected", "restarts", "heartbeat"),
                "last error",
            )
        self.processes = self._table(
            "processes",
            ("process", "inserted", "pending", "extend()", "batches", "sample()", "between", "waits", "last use"),
        )

    def _table(self, title: str, names: tuple[str, ...], *more: str) -> Any:
        with ui.card().classes(CARD):
            ui.label(title).classes("text-sm font-medium")
            columns = [
                {"name": name, "label": name, "field": name, "align": "left" if name in ("phase", *more) else "right"}
                for name in (*names, *more)
            ]
            return ui.table(columns=columns, rows=[], row_key=names[0]).classes("w-full").props("dense flat")

    def _build_look(self) -> None:
        with ui.card().classes(CARD):
            with ui.row().classes("items-center gap-4 w-full"):
                ui.label("a look into the buffer").classes("text-sm font-medium")
                self.pick = ui.select([], label="trajectory", on_change=self._picked).classes("w-40").mark("pick")
                ui.button("newest", on_click=self._newest).props("outline dense no-caps").mark("newest")
                self.texts = ui.label().classes("text-sm").style(f"color:{INK}")
            self.pictures = ui.row().classes("w-full gap-2")
            with ui.row().classes("items-center w-full gap-4 no-wrap"):
                self.slider = ui.slider(min=0, max=1, value=0, on_change=self._scrubbed).props("label")
                self.at = ui.label("").classes("text-sm whitespace-nowrap w-28")
            self.curves = ui.element("div").classes("w-full")
        with ui.card().classes(CARD):
            ui.label("where chunks were drawn: place in the trajectory, and age").classes("text-sm font-medium")
            self.heat = ui.echart(heat_map([], [])).style("width:100%;height:256px")

    # ------------------------------------------------------------------------------------------------ refreshing

    async def refresh(self) -> None:
        """Show the newest reading, unless it is shown already."""
        reading = await run.io_bound(self.page.look)
        if reading is None:
            self.state.set_text(self.page.ended)
            return
        if self.shown == (reading.at, self.page.ended):
            return
        self.shown = reading.at, self.page.ended
        source, stats = self.page.source, reading.stats
        self.title.set_text(f"{'engine' if source.is_engine else 'buffer'} {source.title}".strip())
        state = "ended" if self.page.ended else stats.get("state", "")
        self.state.set_text(state)
        self.state.style(f"color:{'#16a34a' if state == 'READY' else '#dc2626' if state == 'ended' else INK}")
        self.about.set_text(
            f"process {source.pid or '–'} · {stats['trajectories']:,} trajectories, {stats['steps']:,} steps, "
            f"{stats['bytes'] / 2**20:,.1f} MiB · {self.page.ended}".rstrip(" ·")
        )
        self._answer(reading)
        for series, chart in self.charts:
            for at, (name, *_) in enumerate(series):
                chart.options["series"][at]["data"] = [
                    [round(1000 * moment), values.get(name)] for moment, values in self.page.readings
                ]
            chart.update()
        self._rows(stats)
        counts, edges = stats["draws_by_place_and_age"], stats["histograms"]["sampled_age"]["edges"]
        self.heat.options.clear()
        self.heat.options.update(heat_map(counts, edges))
        self.heat.update()
        drawn = [*(chart for _, chart in self.charts), self.heat, *([] if self.chart is None else [self.chart])]
        ui.run_javascript(FIT % [chart.id for chart in drawn])
        if self.look is None:
            await self._newest()

    def _answer(self, reading: Reading) -> None:
        self.answers.clear()
        with self.answers:
            for verdict in verdicts(reading):
                icon, color = ICONS[verdict.level]
                with ui.row().classes("items-center gap-1 no-wrap"):
                    ui.icon(icon, color=color).classes("text-lg")
                    ui.label(verdict.subject).classes("text-sm font-medium")
                    ui.label(verdict.text).classes("text-sm").style(f"color:{INK}")

    def _rows(self, stats: dict[str, Any]) -> None:
        if self.page.source.is_engine:
            self.workers.rows = [_worker(index, worker) for index, worker in enumerate(stats["workers"])]
        used = sorted(stats["processes"], key=lambda row: row["seconds_since_use"] or 0.0)
        self.processes.rows = [_process(row) for row in used[:16]]

    async def _newest(self) -> None:
        ids = await run.io_bound(self.page.ids)
        if ids:
            self.pick.set_options(ids, value=ids[0])

    async def _picked(self) -> None:
        number = self.pick.value
        if number is None:
            return
        try:
            look = await run.io_bound(self.page.trajectory, number)
        except EmbodiChainRLError as error:
            ui.notify(f"{error}"[:200])
            return
        if look is None:  # the page is being closed
            return
        self.look = look
        self.texts.set_text(" · ".join(f"{name}: {text}" for name, text in look.texts.items()))
        self.pictures.clear()
        self.frames.clear()
        with self.pictures:
            for name in look.images:
                with ui.column().classes("gap-1 w-full"):
                    ui.label(name).classes("text-xs").style(f"color:{INK}")
                    with ui.row().classes("items-start gap-2 w-full no-wrap"):
                        frame = ui.html("", sanitize=False).classes("shrink-0").mark("frame")
                        self.frames[name] = frame
                        ui.html(_image(look.strip(name), "film strip", 96), sanitize=False).classes(
                            "overflow-x-auto"
                        ).mark("strip")
        self.curves.clear()
        self.chart = None
        with self.curves:
            if look.curves:
                options, height = curves(look.curves, look.segments)
                self.chart = ui.echart(options).style(f"width:100%;height:{height}px")
                self.slider.props(f"max={max(1, look.length - 1)}")
        self.slider.set_value(0)
        self._scrubbed()

    def _scrubbed(self) -> None:
        if self.look is None:
            return
        step = min(int(self.slider.value), self.look.length - 1)
        self.at.set_text(f"step {step} of {self.look.length}")
        for name, frame in self.frames.items():
            frame.set_content(_image(self.look.frame(name, step), f"step {step}", 192))
        if self.look.curves:
            for series in self.chart.options["series"]:
                if "markLine" in series:
                    series["markLine"]["data"] = [{"xAxis": step}]
            self.chart.update()


def _image(address: str, text: str, height: int) -> str:
    return f'<img src="{address}" alt="{text}" style="height:{height}px;max-width:none;image-rendering:pixelated"/>'


def _worker(index: int, worker: dict[str, Any]) -> dict[str, Any]:
    rate = worker["steps_per_second"]
    return {
        "worker": index,
        "process": worker["pid"] or "–",
        "phase": "held" if worker["held"] else PHASES[worker["phase"]],
        "steps/s": "–" if rate is None else f"{rate:,.0f}",
        "steps": f"{worker['steps']:,}",
        "episodes": f"{worker['trajectories']:,}",
        "rejected": f"{worker['rejected']:,}",
        "restarts": worker["restarts"],
        "heartbeat": f"{duration(worker['seconds_since_heartbeat'])} ago" if worker["pid"] else "–",
        "last error": (worker["last_error"] or "")[:120],
    }


def _process(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "process": f"{row['pid']}" + ("" if row["alive"] else " (ended)"),
        "inserted": f"{row['inserted']:,}",
        "pending": f"{row['pending_trajectories']:,}",
        "extend()": duration(row["extend_s"]),
        "batches": f"{row['batches']:,}",
        "sample()": duration(row["data_s"]),
        "between": duration(row["updt_s"]),
        "waits": "–" if row["starvation"] is None else f"{row['starvation']:.0%}",
        "last use": "–" if row["seconds_since_use"] is None else f"{duration(row['seconds_since_use'])} ago",
    }
