"""Draws docs/method.svg: what the student has of the teacher in Attention Copy and in Attention Distill.

python docs/drawing.py
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).with_name("method.svg")
FROZEN, FRESH, HANDED = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito
PALE = {FROZEN: "#e3eef6", FRESH: "#fbeadf", HANDED: "#def3ec"}
HEIGHT = 0.72
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.hashsalt": "attention-transfer",
    "svg.fonttype": "path",
}


def box(axes: Axes, x: float, y: float, text: str, *, colour: str, width: float) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - HEIGHT / 2), width, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor=PALE[colour], edgecolor=colour, linewidth=1.2,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", linespacing=1.25)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    colour: str = "#444444",
    style: str = "-",
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linestyle=style, linewidth=1.3
        )
    )


def layer(axes: Axes, x: float, colour: str, *, attends: str, takes: str = "values v") -> None:
    """One layer, from the bottom: tokens, its map beside its values, and what goes on."""
    box(axes, x, 0.6, "tokens of the layer", colour=colour, width=3.4)
    if attends:
        box(axes, x - 1.0, 1.9, attends, colour=colour, width=1.7)
        arrow(axes, (x - 1.0, 0.98), (x - 1.0, 1.52))
        arrow(axes, (x - 1.0, 2.28), (x - 1.0, 2.82))
    box(axes, x + 1.0, 1.9, takes, colour=colour, width=1.5)
    arrow(axes, (x + 1.0, 0.98), (x + 1.0, 1.52))
    arrow(axes, (x + 1.0, 2.28), (x + 0.45, 4.12))


def student(axes: Axes, x: float, title: str, *, copied: bool) -> None:
    axes.text(x, 6.05, title, ha="center", va="center", weight="bold", fontsize=11)
    layer(axes, x, FRESH, attends="" if copied else "queries q,\nkeys k")
    if copied:
        box(axes, x - 1.0, 3.2, "the teacher's\nmap P", colour=HANDED, width=1.7)
    else:
        box(axes, x - 1.0, 3.2, "its own map", colour=FRESH, width=1.7)
    arrow(axes, (x - 1.0, 3.58), (x - 0.45, 4.12))
    box(axes, x, 4.5, "P v, MLP, next layer ..", colour=FRESH, width=3.4)
    arrow(axes, (x, 4.88), (x, 5.22))
    axes.text(x, 5.4, "label: task loss", ha="center", va="center")


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 4.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 13.6), ylim=(-0.55, 6.4))
    axes.set_axis_off()
    copy, teacher, distill = 2.1, 6.8, 11.5
    student(axes, copy, "Attention Copy", copied=True)
    student(axes, distill, "Attention Distill", copied=False)
    axes.text(teacher, 6.05, "teacher, frozen", ha="center", va="center", weight="bold", fontsize=11)
    layer(axes, teacher, FROZEN, attends="queries q,\nkeys k")
    box(axes, teacher - 1.0, 3.2, "map P", colour=FROZEN, width=1.7)
    arrow(axes, (teacher - 1.0, 3.58), (teacher - 0.45, 4.12))
    box(axes, teacher, 4.5, "its features are not used", colour=FROZEN, width=3.4)
    arrow(axes, (teacher - 1.9, 3.2), (copy - 0.1, 3.2), colour=HANDED)
    axes.text(3.45, 3.42, "replaces", ha="center", color=HANDED)
    # Above the teacher's values, which it passes by.
    arrow(axes, (teacher - 0.12, 3.2), (distill - 1.9, 3.2), colour=HANDED, style="--")
    axes.text(8.75, 3.42, "cross-entropy", ha="center", color=HANDED)
    for x, text in ((copy, "fresh weights"), (teacher, "pre-trained weights"), (distill, "fresh weights")):
        axes.text(x, -0.02, text, ha="center", va="center", color="#555555")
    axes.text(teacher, -0.38, "the same view of the same image", ha="center", va="center", style="italic")
    return figure


def svg() -> bytes:
    """The picture; the same bytes each time."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        draw().savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


if __name__ == "__main__":
    PICTURE.write_bytes(svg())
