"""How time and memory of a training step grow with tokens and depth: growth.csv, growth.svg, growth.png.

    python benchmarks/growth.py [--quick]

ViT-S/16, forward, backward and AdamW: the plain step, the baseline's, and this library's from cache and online.
Tokens from 50 to 1601 at the model's depth; depths from 2 to 24 at 197 tokens. Memory is what a step
allocates at its peak beyond weights, gradients of the step before (freed) and optimiser state. Medians,
taken in turns.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import flops
import matplotlib as mpl
import measure
import pandas as pd
from matplotlib.figure import Figure
from steps import Setting, Step, Steps, default_setting

from attention_transfer.training.machine import prepare

HERE = Path(__file__).parent
SIZES = (112, 160, 224, 320, 384, 512, 640)  # 50 to 1601 tokens
DEPTHS = (2, 4, 8, 12, 16, 24)
# Okabe and Ito's colours, which the colour-blind can tell apart: one a method, one line style a side.
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "0.45", "linestyle": ":", "marker": "s"},
    "copy, baseline": {"color": "#0072B2", "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "copy, cached": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "distill, baseline": {"color": "#D55E00", "linestyle": "--", "marker": "^", "markerfacecolor": "white"},
    "distill, cached": {"color": "#D55E00", "linestyle": "-", "marker": "^"},
    "distill, online": {"color": "#E69F00", "linestyle": "-", "marker": "v"},
}
Point = dict[str, tuple[float, float]]  # of each step: seconds and bytes


def measured(setting: Setting, repeats: int) -> Point:
    """All steps of one setting."""
    with tempfile.TemporaryDirectory() as name:
        steps = Steps(setting, Path(name) / "cache")
        actions: dict[str, Step] = {
            "plain": steps.plain(),
            "copy, baseline": steps.baseline("copy"),
            "copy, cached": steps.ours("copy", steps.cached),
            "distill, baseline": steps.baseline("distill"),
            "distill, cached": steps.ours("distill", steps.cached),
            "distill, online": steps.ours("distill", steps.online),
        }
        taken = measure.medians(actions, repeats=repeats, warm_up=1, device=setting.device)
        held = {name: measure.peak_bytes(action, setting.device) for name, action in actions.items()}
    print(
        f"{flops.tokens(setting.size):5} tokens, {len(steps.layers):2} layers: "
        + "  ".join(f"{name} {1e3 * taken[name]:.0f} ms {held[name] / 1e6:.0f} MB" for name in actions),
        flush=True,
    )
    return {name: (taken[name], held[name]) for name in actions}


def draw(by_tokens: dict[int, Point], by_depth: dict[int, Point], title: str) -> Figure:
    """Time above, memory below; tokens on the left, depth on the right."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, (label, points) in enumerate((("tokens", by_tokens), ("layers", by_depth))):
        for row, (quantity, factor) in enumerate(
            (("time of a step (s)", 1.0), ("memory of a step (GB)", 1e-9))
        ):
            axis = axes[row, column]
            for name, style in STYLES.items():
                heights = [factor * point[name][row] for point in points.values()]
                axis.plot(list(points), heights, label=name, markersize=4, linewidth=1.5, **style)
            axis.set_ylabel(quantity)
            axis.set_ylim(bottom=0)
            axis.grid(color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
        axes[1, column].set_xlabel(label)
    axes[1, 1].set_xticks(list(by_depth))
    axes[0, 0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def table(by_tokens: dict[int, Point], by_depth: dict[int, Point], setting: Setting) -> pd.DataFrame:
    """One row for each step that was timed."""
    depth, tokens = setting.arguments.get("depth", 12), flops.tokens(setting.size)
    points = [(count, depth, point) for count, point in by_tokens.items()]
    points += [(tokens, count, point) for count, point in by_depth.items()]
    return pd.DataFrame(
        [
            {"tokens": count, "layers": layers, "step": name, "seconds": seconds, "megabytes": held / 1e6}
            for count, layers, point in points
            for name, (seconds, held) in point.items()
        ]
    )


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    setting = default_setting(device, quick=options.quick)
    if not options.quick:
        setting = replace(setting, batch=16 if device.type == "cuda" else 2, views=16)
    sizes, depths = ((32, 48), (1, 2)) if options.quick else (SIZES, DEPTHS)
    repeats = 1 if options.quick else 5
    base = setting.arguments
    by_tokens = {
        flops.tokens(size): measured(replace(setting, arguments={**base, "img_size": size}), repeats)
        for size in sizes
    }
    by_depth = {
        depth: measured(replace(setting, arguments={**base, "depth": depth}), repeats) for depth in depths
    }
    precision = str(setting.precision).removeprefix("torch.")
    title = f"A training step of ViT-S/16 batch {setting.batch}, {device.type}, {precision}"
    figure = draw(by_tokens, by_depth, title)
    if options.quick:
        return
    name = "growth" if device.type == "cpu" else f"growth_{device.type}"
    table(by_tokens, by_depth, setting).to_csv(HERE / f"{name}.csv", index=False, float_format="%.4g")
    mpl.rcParams["svg.hashsalt"] = name  # equal figures, equal files
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    figure.savefig(HERE / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
