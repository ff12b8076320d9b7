"""Draws metrics and their differences with the intervals of the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.config.fields import METRIC_UNBOUNDED, is_folder, is_there
from fedrag_cli.errors import ConfigError, FedRAGError
from fedrag_cli.reports.plots import (
    BLUE,
    GREEN,
    GREY,
    LINE_COLOURS,
    ORANGE,
    label_of,
    new_panels,
    picture_of,
    save_figure,
    tidy,
)
from fedrag_cli.runs.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


VERDICT_COLOURS = {"better": GREEN, "worse": ORANGE, "no difference shown": GREY}
MODEL_COLOURS = {"untuned": GREY, "federated": BLUE, "pooled": GREEN}
SOFTWARE = "fedrag compare"
# What the files say of who has made them, for matplotlib and as it stands in them.
METADATA = {"png": {"Software": SOFTWARE}, "pdf": {"Creator": SOFTWARE}, "svg": {"Creator": SOFTWARE}}
MARKS = {
    "png": f"Software\0{SOFTWARE}".encode(),
    "pdf": f"/Creator ({SOFTWARE})".encode(),
    "svg": f"<dc:title>{SOFTWARE}</dc:title>".encode(),
}
LARGEST_PLOT = 50 * 2**20
ALL = "all"


def _draw_interval(
    axes: Axes, item: Mapping[str, float], row: float, colour: str, *, width: float = 2.5, size: float = 6
) -> None:
    axes.hlines(row, item["low"], item["high"], color=colour, linewidth=width)
    axes.plot(item["mean"], row, color=colour, marker="o", markersize=size)


def plot_difference(differences: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Draw what a run changed, as `MetricDifference.to_dict` gives it: metrics before and after, and the difference."""
    if not differences:
        raise FedRAGError("There is no difference to draw.", "Evaluate at least one metric before and after.")
    size = (10, 1.5 + 0.55 * len(differences))
    figure, (values, changes) = new_panels(2, 2, size, (0, 0), sharey=True, width_ratios=(1, 1.1))
    rows = range(len(differences))
    before, after = ([item[when] for item in differences] for when in ("before", "after"))
    values.hlines(rows, before, after, color="#BBBBBB", linewidth=2, zorder=1)
    # A ring around a smaller dot shows both where nothing changed.
    values.scatter(before, rows, s=80, facecolor="white", edgecolor=GREY, linewidth=1.6, label="before", zorder=2)
    values.scatter(after, rows, s=35, color=BLUE, label="after", zorder=3)
    values.margins(x=0.12)
    values.set_xlabel("mean over the questions")
    labels = [
        f"{item['metric']} (n = {item['n']})\n{item['before']:.3f} \N{RIGHTWARDS ARROW} {item['after']:.3f}"
        for item in differences
    ]
    values.set_yticks(rows, labels, fontsize=9)
    # The first metric belongs at the top; matplotlib counts upwards.
    values.set_ylim(len(differences) - 0.4, -0.6)
    values.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.3)
    changes.axvline(0, color="black", linewidth=1)
    for row, item in enumerate(differences):
        colour, change = VERDICT_COLOURS[item["verdict"]], item["difference"]
        _draw_interval(changes, change, row, colour, size=7)
        note = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]\n{item['verdict']}"
        changes.text(1.02, row, note, transform=changes.get_yaxis_transform(), va="center", fontsize=8.5, color=colour)
    changes.margins(x=0.08)
    levels = sorted({item["confidence"] for item in differences})
    changes.set_xlabel(f"after - before, with {' or '.join(f'{100 * level:g} %' for level in levels)} interval")
    changes.tick_params(axis="y", length=0)
    for axes in (values, changes):
        tidy(axes)
    save_figure(figure, Path(path))


def plot_evaluation(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the metrics of an evaluation's summary as dots with intervals, a panel a metric, a row a group."""
    metrics = summary["metrics"]
    rows = {ALL: metrics, **summary["groups"]}
    labels = []
    for name, found in rows.items():
        counts = [item["n"] for item in found.values()]
        labels.append(f"{label_of(name)} (n = {max(counts)})" if counts else label_of(name))
    columns = 4
    figure, panels = new_panels(len(metrics), columns, (1.8, 1.4), (2.9, 0.32 * len(rows)), sharey=True)
    for number, (panel, metric) in enumerate(zip(panels, metrics, strict=True)):
        for row, (name, found) in enumerate(rows.items()):
            if metric in found:
                _draw_interval(panel, found[metric], row, BLUE if name == ALL else GREEN)
        panel.set_yticks(range(len(labels)), labels, fontsize=9)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        if metric not in METRIC_UNBOUNDED:
            panel.set_xlim(-0.02, 1.02)
        if number % min(len(metrics), columns) == 0:
            panel.set_xlabel(f"mean, {100 * summary['confidence']:g} % interval", fontsize=8)
        tidy(panel, title=f"{metric}  {metrics[metric]['mean']:.3f}", title_size=10)
    save_figure(figure, path)


def plot_baselines(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw the metrics of each way to tune with their intervals, and the paired difference to the untuned model."""
    rows = comparison["rows"]
    metrics = rows[0]["metrics"]
    figure, panels = new_panels(len(metrics), 3, (2.2, 0), (3.6, 1.1 + 0.36 * len(rows)), sharey=True)
    for panel, metric in zip(panels, metrics, strict=True):
        for place, row in enumerate(rows):
            found = row["metrics"][metric]
            _draw_interval(panel, found, place, MODEL_COLOURS.get(row["name"], LINE_COLOURS[4]), width=2.2)
            note = f"{found['mean']:.3f}"
            if "to_untuned" in row:
                change = row["to_untuned"][metric]["difference"]
                note += f"  ({change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}])"
            panel.annotate(
                note, (found["mean"], place), xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center"
            )
        panel.axvline(metrics[metric]["mean"], color=MODEL_COLOURS["untuned"], linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(rows)), [label_of(row["name"]) for row in rows], fontsize=9)
        panel.set_ylim(len(rows) - 0.5, -0.7)
        level = f"{100 * comparison['confidence']:g} %"
        panel.set_xlabel(f"mean with {level} interval (paired difference to untuned)", fontsize=7.5)
        panel.margins(x=0.18)
        tidy(panel, title=metric, title_size=10)
    save_figure(figure, path)


def plot_comparisons(comparisons: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw comparisons as `Comparison.to_dict` gives them, in the format that the file's ending names."""
    format = _format_of(path)
    write_bytes_atomically(path, picture_of(draw_comparisons(comparisons), format, METADATA[format]))


def require_plot_file(path: Path, *, force: bool) -> None:
    """Raise ConfigError where a file ends in no format of plots, is a folder, or, unless forced, no plot of ours."""
    format = _format_of(path)
    if format not in METADATA:
        raise ConfigError(
            f"'{path}' does not end in a format that plots are written in.",
            f"Name a file that ends in {' or '.join(f'.{known}' for known in METADATA)} with --plot.",
        )
    if is_folder(path):
        raise ConfigError(f"'{path}' is a folder.", "Name a file, such as difference.png, with --plot.")
    if force or not is_there(path):
        return
    if path.stat().st_size > LARGEST_PLOT or MARKS[format] not in path.read_bytes():
        raise ConfigError(
            f"'{path}' is there already and is no plot of fedrag compare.",
            "Name another file with --plot, or overwrite it with --force.",
        )


def _format_of(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def draw_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure that `plot_comparisons` writes."""
    count = sum(len(item["differences"]) for item in comparisons)
    size = (10.5, 1.5 + 0.42 * count + 0.3 * len(comparisons))
    figure, (changes, questions) = new_panels(2, 2, size, (0, 0), sharey=True, width_ratios=(1.5, 1))
    labels, rows, row = [], [], 0.0
    for item in comparisons:
        name, baseline = label_of(item["label"]), label_of(item["baseline_label"])
        transform = changes.get_yaxis_transform()
        title = changes.text(
            0.01, row, f"{name}  against  {baseline}", transform=transform, fontsize=9, weight="bold", va="center"
        )
        # A long title may run into the next panel rather than push it away.
        title.set_in_layout(False)
        for difference in item["differences"]:
            row += 1
            colour, change = VERDICT_COLOURS[difference["verdict"]], difference["difference"]
            _draw_interval(changes, change, row, colour)
            changes.annotate(
                f"{change['mean']:+.3f} {difference['verdict']}",
                (change["high"], row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
            )
            _draw_questions(questions, difference, row)
            labels.append(f"{difference['metric']} (n = {difference['n']})")
            rows.append(row)
        row += 1.3
    changes.set_yticks(rows, labels, fontsize=9)
    changes.set_ylim(row - 0.6, -0.7)
    level = 100 * comparisons[0]["differences"][0]["confidence"]
    changes.set_xlabel(f"difference, with {level:g} % interval")
    changes.margins(x=0.25)
    questions.set_xlabel("questions lost and won")
    questions.margins(x=0.2)
    questions.tick_params(axis="y", length=0)
    # Titles may reach into the second panel.
    changes.set_zorder(questions.get_zorder() + 1)
    changes.patch.set_visible(False)
    for axes in (changes, questions):
        axes.axvline(0, color="black", linewidth=1)
        tidy(axes)
    return figure


def _draw_questions(axes: Axes, difference: Mapping[str, Any], row: float) -> None:
    for count, name in ((difference["won"], "better"), (-difference["lost"], "worse")):
        axes.barh(row, count, height=0.55, color=VERDICT_COLOURS[name])
        if count:
            axes.text(count, row, f" {abs(count)} ", ha="left" if count > 0 else "right", va="center", fontsize=8)
