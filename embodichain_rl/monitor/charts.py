"""The charts of the web page, as options of ECharts. Their colors read well on light and on dark ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodichain_rl.monitor.verdicts import duration

__all__ = ["AMBER", "BLUE", "GREEN", "INK", "PURPLE", "curves", "heat_map", "lines"]

BLUE, AMBER, GREEN, PURPLE, INK = "#3b82f6", "#f59e0b", "#22c55e", "#a855f7", "#8b95a5"
COLORS = (BLUE, AMBER, GREEN, PURPLE, "#ef4444", "#06b6d4", "#84cc16", "#ec4899")
RULE: dict[str, Any] = {"lineStyle": {"color": "rgba(139,149,165,0.25)"}}
AXIS: dict[str, Any] = {"axisLabel": {"color": INK, "fontSize": 10}, "splitLine": RULE, "axisLine": RULE}


def lines(series: Sequence[tuple[str, str, str]], *, logarithmic: bool, most: float | None) -> dict[str, Any]:
    """Return a chart of curves over time.

    Args:
        series: name, label and color of each.
        logarithmic: the scale.
        most: the upper end of the scale, of shares.
    """
    scale: dict[str, Any] = {"type": "log" if logarithmic else "value", **AXIS}
    if most is not None:
        scale |= {"min": 0, "max": most, "axisLabel": {**AXIS["axisLabel"], ":formatter": "v => (100 * v) + ' %'"}}
    elif not logarithmic:
        scale |= {"scale": True}
    return {
        "animation": False,
        "grid": {"left": 48, "right": 12, "top": 28, "bottom": 22},
        "tooltip": {"trigger": "axis", ":valueFormatter": "v => v == null ? '–' : Number(v).toPrecision(4)"},
        "legend": {"top": 0, "right": 0, "textStyle": {"color": INK, "fontSize": 10}, "itemWidth": 14, "itemHeight": 8},
        "xAxis": {
            "type": "time",
            **AXIS,
            "splitLine": {"show": False},
            "splitNumber": 4,
            "axisLabel": {**AXIS["axisLabel"], "formatter": "{HH}:{mm}:{ss}", "hideOverlap": True},
        },
        "yAxis": scale,
        "series": [
            {
                "type": "line",
                "name": label,
                "showSymbol": False,
                "lineStyle": {"width": 1.6},
                "color": color,
                "data": [],
            }
            for _, label, color in series
        ],
    }


def curves(values: Mapping[str, np.ndarray], segments: Sequence[tuple[int, int, int]]) -> tuple[dict[str, Any], int]:
    """Return the curves of a trajectory, one below the other on one axis of steps, and their height in pixels.

    Args:
        values: by name, ``[T, n]``.
        segments: first step, end and id of each.
    """
    top, each, gap = 8, 84, 34
    grids, x_axes, y_axes, titles, series = [], [], [], [], []
    names = list(values)[:12]
    areas = [
        [{"xAxis": begin, "itemStyle": {"color": "rgba(139,149,165,0.14)"}}, {"xAxis": end - 1}]
        for number, (begin, end, _) in enumerate(segments)
        if number % 2
    ]
    for row, name in enumerate(names):
        begin = top + row * (each + gap) + 18
        grids.append({"left": 52, "right": 14, "top": begin, "height": each})
        last = row == len(names) - 1
        x_axes.append(
            {
                "type": "value",
                "gridIndex": row,
                **AXIS,
                "max": len(values[name]) - 1 or 1,
                "splitLine": {"show": False},
                "axisLabel": {**AXIS["axisLabel"], "show": last},
            }
        )
        y_axes.append({"type": "value", "gridIndex": row, "scale": True, **AXIS, "splitNumber": 2})
        titles.append(
            {"text": name, "left": 4, "top": begin - 20, "textStyle": {"color": INK, "fontSize": 11, "fontWeight": 500}}
        )
        for dimension in range(min(8, values[name].shape[1])):
            line: dict[str, Any] = {
                "type": "line",
                "name": f"{name}[{dimension}]",
                "xAxisIndex": row,
                "yAxisIndex": row,
                "showSymbol": False,
                "lineStyle": {"width": 1.3},
                "color": COLORS[dimension],
                "data": [[step, _finite(value)] for step, value in enumerate(values[name][:, dimension].tolist())],
            }
            if dimension == 0:
                line["markLine"] = {
                    "silent": True,
                    "symbol": "none",
                    "label": {"show": False},
                    "lineStyle": {"color": "#ef4444", "type": "solid", "width": 1},
                    "data": [{"xAxis": 0}],
                    "animation": False,
                }
                line["markArea"] = {"silent": True, "data": areas}
            series.append(line)
    options = {
        "animation": False,
        "grid": grids,
        "xAxis": x_axes,
        "yAxis": y_axes,
        "title": titles,
        "series": series,
        "tooltip": {"trigger": "axis", ":valueFormatter": "v => Number(v).toPrecision(4)"},
        "axisPointer": {"link": [{"xAxisIndex": "all"}]},
    }
    return options, top + len(names) * (each + gap) + 20


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def heat_map(counts: Sequence[Sequence[int]], edges: Sequence[float]) -> dict[str, Any]:
    """Return a map of where chunks were drawn from: places across, ages upwards.

    Args:
        counts: ``[places][ages]``.
        edges: of the ages, two buckets of which are one row.
    """
    table = np.array(counts if len(counts) else [[0]])
    used = np.flatnonzero(table.sum(axis=0))
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    labels = [
        f"≤ {duration(edges[min(2 * age + 2, len(edges) - 1)])}" if len(edges) else "" for age in range(low, high)
    ]
    cells = [[place, age - low, int(table[place, age])] for place in range(len(table)) for age in range(low, high)]
    places = [f"{100 * place // len(table)} %" for place in range(len(table))]
    return {
        "animation": False,
        "grid": {"left": 64, "right": 80, "top": 8, "bottom": 40},
        "tooltip": {},
        "xAxis": {
            "type": "category",
            "data": places,
            "name": "place in the trajectory",
            "nameLocation": "middle",
            "nameGap": 26,
            "nameTextStyle": {"color": INK, "fontSize": 10},
            **AXIS,
        },
        "yAxis": {"type": "category", "data": labels, **AXIS},
        "visualMap": {
            "min": 0,
            "max": max(1, int(table.max())),
            "right": 4,
            "top": "middle",
            "itemHeight": 90,
            "itemWidth": 10,
            "textStyle": {"color": INK, "fontSize": 10},
            "text": ["most", "none"],
            "inRange": {"color": ["rgba(59,130,246,0.04)", BLUE]},  # the most stands out on any ground
        },
        "series": [{"type": "heatmap", "data": cells}],
    }
