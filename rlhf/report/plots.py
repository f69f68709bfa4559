"""The report's pictures: matplotlib figures as SVG in data URIs, so that the page needs nothing beside itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.report.reading import Json

# Okabe and Ito's colours, which people with any common colour vision tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.family": ["sans-serif"], "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e9ee",
    "axes.edgecolor": "#8a94a3", "axes.labelcolor": "#3c4654", "xtick.color": "#3c4654", "ytick.color": "#3c4654",
    "legend.frameon": False, "lines.linewidth": 1.6, "axes.axisbelow": True, "axes.prop_cycle": "cycler('color', "
    + str(list(COLOURS)) + ")",
}  # fmt: skip
POINTS = 400  # of a line; a longer one is thinned to every n-th recorded point, its last one kept


@dataclass(frozen=True, slots=True)
class Picture:
    """`src` is a data URI, or None with the reason under `missing`."""

    title: str
    src: str | None
    alt: str = ""
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """Recorded keys that share an axis."""

    title: str
    unit: str
    keys: tuple[str, ...]


CURVES = {
    "sft": (Curve("SFT loss", "nats a token", ("train/loss", "eval/loss")),),
    "rm": (
        Curve("Reward model loss", "nats a pair", ("train/loss", "eval/loss")),
        Curve("Reward model accuracy", "held-out pairs", ("eval/accuracy",)),
    ),
    "ppo": (
        Curve("Reward", "normalised score", ("reward/score", "eval/reward", "eval/holdout")),
        Curve("KL to the SFT model", "nats a response", ("kl/mean", "eval/kl")),
        Curve("Length", "tokens a response", ("rollout/length", "eval/length")),
        Curve("Entropy", "nats a token", ("policy/entropy", "eval/entropy")),
        Curve("Explained variance of the critic", "share", ("critic/explained_variance",)),
        Curve("Policy loss", "", ("policy/loss",)),
        Curve("Critic loss", "", ("critic/loss",)),
        Curve("Clipped and cut", "share", ("policy/clip_fraction", "rollout/eos_rate")),
    ),
}  # fmt: skip


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def points(rows: Sequence[Json], x: str, y: str) -> list[tuple[float, float]]:
    """The rows where both are numbers."""
    found = [(row[x], row[y]) for row in rows if finite(row.get(x)) and finite(row.get(y))]
    stride = math.ceil(len(found) / POINTS) or 1
    return found[::-1][::stride][::-1]


def picture(title: str, alt: str, size: tuple[float, float] = (4.2, 2.6)) -> tuple[Figure, Axes]:
    """An empty figure; `alt` says what it will show. Its margins are fixed: a layout engine draws it a second time."""
    figure = Figure(figsize=size)
    figure.subplots_adjust(left=0.18, right=0.97, bottom=0.19, top=0.92)
    figure.set_label(alt)
    axes = figure.add_subplot()
    axes.set_gid(title)
    return figure, axes


def to_picture(figure: Figure, title: str) -> Picture:
    """The figure as an SVG without a date, so that the same run gives the same page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(title, f"data:image/svg+xml;base64,{encoded}", alt=str(figure.get_label()))


def curve(spec: Curve, runs: Sequence[tuple[str, Sequence[Json]]]) -> Picture:
    """The curve of one run, or that of several in one picture: then only the first key that each has recorded."""
    series = []
    for name, rows in runs:
        lines = [(key, points(rows, "step", key)) for key in spec.keys]
        lines = [(key, line) for key, line in lines if line]
        series += [(f"{name}: {key}", line) for key, line in lines[:1]] if len(runs) > 1 else lines
    if not series:
        return Picture(spec.title, None, missing=f"not measured: no {' or '.join(spec.keys)} is recorded")
    with rc_context(STYLE):
        figure, axes = picture(spec.title, f"{spec.title} by update: {', '.join(name for name, _ in series)}")
        for name, line in series:
            few = len(line) <= 12
            axes.plot(*zip(*line, strict=True), marker="o" if few else "", markersize=3.5, label=literal(name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("update")
        axes.set_ylabel(spec.unit)
        axes.legend(fontsize=8)
        return to_picture(figure, spec.title)


def literal(text: str) -> str:
    """A label without matplotlib's mathematics and its rule that a leading underscore hides it."""
    return text.replace("$", r"\$").lstrip("_")[:60]


def over_kl(rows: Sequence[Json]) -> Picture:
    """Reward and holdout reward over sqrt(KL), the axis of Gao et al. (2210.10760)."""
    title = "Reward and holdout over √KL"
    lines = {
        key: [(math.sqrt(max(kl, 0.0)), value) for kl, value in points(rows, "eval/kl", key)]
        for key in ("eval/reward", "eval/holdout")
    }
    if not lines["eval/reward"]:
        return Picture(title, None, missing="not measured: no evaluation is recorded")
    with rc_context(STYLE):
        figure, axes = picture(title, "Evaluated reward and holdout reward over the square root of KL")
        for (key, line), marker in zip(lines.items(), "os", strict=True):
            if line:
                axes.plot(*zip(*line, strict=True), marker=marker, markersize=4, label=key)
        axes.set_xlabel("√KL, √nats")
        axes.set_ylabel("normalised score")
        axes.legend(fontsize=8)
        if not lines["eval/holdout"]:
            axes.set_title("holdout reward: not measured", fontsize=8, loc="left", color="#59636f")
        return to_picture(figure, title)


def calibration(report: Json | None) -> Picture:
    """The bins of report.json with their intervals against the diagonal."""
    title = "Calibration of the reward model"
    part = (report or {}).get("calibration")
    bins = [b for b in (part or {}).get("bins", []) if all(finite(b.get(k)) for k in BIN)]
    if not bins:
        why = ((report or {}).get("missing") or {}).get("calibration", "the run has no rm/report.json with it")
        return Picture(title, None, missing=f"not measured: {why}")
    with rc_context(STYLE):
        figure, axes = picture(title, "Share of pairs ordered rightly over the confidence of the reward model")
        x, y = [b["confidence"] for b in bins], [b["estimate"] for b in bins]
        low = [max(0.0, b["estimate"] - b["lower"]) for b in bins]
        high = [max(0.0, b["upper"] - b["estimate"]) for b in bins]
        axes.plot([0.5, 1], [0.5, 1], color="#8a94a3", linestyle="--", linewidth=1, label="calibrated")
        axes.errorbar(x, y, yerr=[low, high], fmt="o", markersize=4, capsize=2, label="held-out pairs, 95 %")
        axes.set_xlabel("confidence")
        axes.set_ylabel("ordered rightly")
        axes.legend(fontsize=8)
        return to_picture(figure, title)


BIN = ("confidence", "estimate", "lower", "upper")


def rewards(report: Json | None) -> Picture:
    title = "Rewards on held-out responses"
    part = (report or {}).get("rewards")
    if not part or len(part.get("edges", [])) != len(part.get("counts", [])) + 1:
        return Picture(title, None, missing="not measured: the run has no rm/report.json with it")
    with rc_context(STYLE):
        figure, axes = picture(title, "Histogram of the reward model's scores of held-out responses")
        axes.stairs(part["counts"], part["edges"], fill=True, alpha=0.8)
        axes.set_xlabel("reward")
        axes.set_ylabel("responses")
        return to_picture(figure, title)


def toxicity(stages: Sequence[tuple[str, Json | None]]) -> Picture:
    """Each stage's toxicity check: estimate, Wilson interval, limit."""
    title = "Toxic responses by stage"
    known = [(name, check) for name, check in stages if check and finite(check.get("estimate"))]
    if not known:
        return Picture(title, None, missing="not measured: no verdict holds a toxicity check")
    with rc_context(STYLE):
        figure, axes = picture(title, "Share of toxic responses by stage, with 95 % intervals and limits")
        for place, (_, check) in enumerate(known):
            rate, details = check["estimate"], check.get("details") or {}
            low, high = details.get("wilson_low"), details.get("wilson_high")
            known_ends = finite(low) and finite(high)
            bars = [[max(0.0, 100 * (rate - low))], [max(0.0, 100 * (high - rate))]] if known_ends else None
            axes.bar(place, 100 * rate, 0.55, yerr=bars, capsize=4, color=COLOURS[place], ecolor="#22272e")
            if finite(check.get("limit")):
                axes.hlines(100 * check["limit"], place - 0.4, place + 0.4, colors="#22272e", linestyles=":")
        axes.set_xticks(range(len(known)), [name for name, _ in known])
        axes.set_ylabel("% of prompts; dotted: limit")
        axes.grid(axis="x", visible=False)
        return to_picture(figure, title)


def lengths(stages: Sequence[tuple[str, Sequence[Json]]]) -> Picture:
    """Tokens of the responses that the gates sampled."""
    title = "Length of the gates' samples"
    known = [(name, [row["tokens"] for row in rows if finite(row.get("tokens"))]) for name, rows in stages]
    known = [(name, values) for name, values in known if values]
    if not known:
        return Picture(title, None, missing="not measured: no gate has sampled responses")
    top = max(max(values) for _, values in known)
    step = max(1, math.ceil((top + 1) / 30))
    edges = list(range(0, int(top) + 2 * step, step))
    with rc_context(STYLE):
        figure, axes = picture(title, "Histograms of response lengths in tokens by stage")
        for name, values in known:
            axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.45, label=f"{name}, {len(values)} responses")
        axes.set_xlabel("tokens")
        axes.set_ylabel("responses")
        axes.legend(fontsize=8)
        return to_picture(figure, title)
