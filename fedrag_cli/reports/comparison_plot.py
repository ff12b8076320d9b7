"""Draws what runs have over a baseline: each metric's difference with its interval, and the questions behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.config.fields import is_folder, is_there
from fedrag_cli.errors import ConfigError
from fedrag_cli.reports.plots import VERDICT_COLOURS, label_of, new_figure, picture_of, tidy
from fedrag_cli.runs.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SOFTWARE = "fedrag compare"
# What the files say of who has made them, for matplotlib and as it stands in them.
METADATA = {"png": {"Software": SOFTWARE}, "pdf": {"Creator": SOFTWARE}, "svg": {"Creator": SOFTWARE}}
MARKS = {
    "png": f"Software\0{SOFTWARE}".encode(),
    "pdf": f"/Creator ({SOFTWARE})".encode(),
    "svg": f"<dc:title>{SOFTWARE}</dc:title>".encode(),
}
LARGEST_PLOT = 50 * 2**20


def plot_comparisons(comparisons: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw comparisons as `Comparison.to_dict` gives them.

    Args:
        comparisons: At least one; each becomes a block of rows, one a metric.
        path: The file; its ending says the format, as `require_plot_file` checks it.
    """
    format = _format_of(path)
    write_bytes_atomically(path, picture_of(draw_comparisons(comparisons), format, METADATA[format]))


def require_plot_file(path: Path, *, force: bool) -> None:
    """Make sure that a plot may be written into a file.

    Args:
        path: The file.
        force: Whether a file that is no plot of `fedrag compare` may be overwritten.

    Raises:
        ConfigError: Its ending names no format, or it is a folder, or a file that is no plot of ours.
    """
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
    rows = [(item, difference) for item in comparisons for difference in item["differences"]]
    figure = new_figure((10.5, 1.5 + 0.42 * len(rows) + 0.3 * len(comparisons)))
    changes, questions = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    labels, places, place = [], [], 0.0
    for item in comparisons:
        _draw_title(changes, item, place)
        for difference in item["differences"]:
            place += 1
            _draw_difference(changes, difference, place)
            _draw_questions(questions, difference, place)
            labels.append(f"{difference['metric']} (n = {difference['n']})")
            places.append(place)
        place += 1.3
    changes.axvline(0, color="black", linewidth=1)
    changes.set_yticks(places, labels, fontsize=9)
    changes.set_ylim(place - 0.6, -0.7)
    level = 100 * comparisons[0]["differences"][0]["confidence"]
    changes.set_xlabel(f"difference, with {level:g} % interval")
    changes.margins(x=0.25)
    questions.axvline(0, color="black", linewidth=1)
    questions.set_xlabel("questions lost and won")
    questions.margins(x=0.2)
    questions.tick_params(axis="y", length=0)
    # Titles may reach into the second panel.
    changes.set_zorder(questions.get_zorder() + 1)
    changes.patch.set_visible(False)
    for axes in (changes, questions):
        tidy(axes, grid="x")
    return figure


def _draw_title(axes: Axes, item: Mapping[str, Any], place: float) -> None:
    title = axes.text(
        0.01,
        place,
        f"{label_of(item['label'])}  against  {label_of(item['baseline_label'])}",
        transform=axes.get_yaxis_transform(),
        fontsize=9,
        weight="bold",
        va="center",
    )
    # A long title may run into the next panel rather than push it away.
    title.set_in_layout(False)


def _draw_difference(axes: Axes, difference: Mapping[str, Any], place: float) -> None:
    colour = VERDICT_COLOURS[difference["verdict"]]
    mean, low, high = (difference["difference"][name] for name in ("mean", "low", "high"))
    axes.hlines(place, low, high, color=colour, linewidth=2.5)
    axes.plot(mean, place, color=colour, marker="o", markersize=6)
    axes.annotate(
        f"{mean:+.3f} {difference['verdict']}",
        (high, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=colour,
    )


def _draw_questions(axes: Axes, difference: Mapping[str, Any], place: float) -> None:
    for count, name in ((difference["won"], "better"), (-difference["lost"], "worse")):
        axes.barh(place, count, height=0.55, color=VERDICT_COLOURS[name])
        if count:
            side = "left" if count > 0 else "right"
            axes.text(count, place, f" {abs(count)} ", ha=side, va="center", fontsize=8)
