"""What the page's attention viewer shows: where teacher and student look from the class token, and the difference."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
from PIL import Image

from attention_transfer.reporting import figures
from attention_transfer.reporting.charts import CONFIG, Chart
from attention_transfer.reporting.records import Records

STEPS = 65535
"""A weight within 0..1 is handed over as a 16-bit integer: a fifth of the bytes of its digits."""
SIDE = 200
"""Pixels of a panel."""
CAPTION = (
    "Attention from the class token to the patches, over the image; teacher and student on one scale. A copying "
    "student has the teacher's own maps, and so is not among the students. Layers and heads are counted from 0."
)
PANELS = ("teacher", "student", "difference")


def payload(records: Records, artifacts: Path) -> dict[str, Any]:
    """Images and attention of all that can be chosen, for the page's script.

    Args:
        artifacts: the study's folder of large outputs; read is maps/maps.npz.

    Returns:
        caption; images: a PNG each, as data URI; classes: of each image its class's name; layers, counted from 0;
        students; heads: their number; side: of the grid of patches; packed: by model the attention from the class
        token to the patches, base64 of little-endian 16-bit integers (images, layers, heads, side * side), of which
        `steps` mean 1.
    """
    arrays = figures.read_attention_maps(records, artifacts)
    names = figures.known_models(records, arrays)
    weights = {name: arrays[f"maps_{name}"][:, :, :, 0, 1:] for name in names}
    images, _, heads, patches = weights["teacher"].shape
    return {
        "caption": CAPTION,
        "images": [_png(image) for image in arrays["images"][:images]],
        "classes": arrays["classes"][:images].tolist(),
        "layers": arrays["layers"].tolist(),
        "students": [name for name in names if name != "teacher"],
        "heads": heads,
        "side": math.isqrt(patches),
        "steps": STEPS,
        "packed": {name: _packed(weight) for name, weight in weights.items()},
    }


def charts() -> list[Chart]:
    """The viewer's three panels; their data come from its script: `picture` and `patches`."""
    return [_panel(name) for name in PANELS]


def _panel(name: str) -> Chart:
    # Teacher and student share the scale that the script sets: their colours can be compared.
    most = alt.param(name="most", value=100)
    if name == "difference":
        # As far as the other two go: a difference that is small beside them looks small.
        ends = {"domainMin": alt.ExprRef("-most"), "domainMax": alt.ExprRef("most")}
        scale = alt.Scale(scheme="purpleorange", domainMid=0, reverse=True, **ends)
        title = "difference, %"
    else:
        scale = alt.Scale(scheme="inferno", domainMin=0, domainMax=alt.ExprRef("most"))
        title = "attention, %"
    legend = alt.Legend(orient="bottom", gradientLength=SIDE - 20, gradientThickness=8)
    colour = alt.Color("weight:Q", title=title, scale=scale, legend=legend)
    whole = alt.Scale(domain=[0, 1], nice=False)
    x, y = alt.X("left:Q", scale=whole, axis=None), alt.Y("top:Q", scale=whole, axis=None)
    picture = (
        alt.Chart(alt.NamedData(name="picture")).mark_image(width=SIDE, height=SIDE, aria=False)
        .encode(x=alt.XValue(SIDE / 2), y=alt.YValue(SIDE / 2), url="url:N")
    )  # fmt: skip
    patches = (
        alt.Chart(alt.NamedData(name="patches")).mark_rect(opacity=0.7)
        .encode(x=x, x2="right:Q", y=y, y2="bottom:Q", color=colour)
        .encode(description="said:N", tooltip=["row:O", "column:O", alt.Tooltip("weight:Q", title=title, format=".2f")])
    )  # fmt: skip
    chart = alt.layer(picture, patches).properties(width=SIDE, height=SIDE).add_params(most)
    return Chart(f"attention_{name}", chart.to_dict() | {"config": CONFIG}, f"{CAPTION} Here: {name}.")


def _png(image: np.ndarray) -> str:
    """uint8 (C, H, W) as data URI, each pixel enlarged so that no browser smooths a small image."""
    times = max(1, math.ceil(SIDE / max(image.shape[1:])))
    pixels = np.moveaxis(image, 0, -1).repeat(times, axis=0).repeat(times, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _packed(weights: np.ndarray) -> str:
    return base64.b64encode(np.round(weights * STEPS).astype("<u2").tobytes()).decode()
