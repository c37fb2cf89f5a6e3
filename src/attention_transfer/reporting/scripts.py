"""The libraries that the page carries with it: it needs no network."""

from __future__ import annotations

import base64
import functools
from importlib.resources import files

import vl_convert
from markupsafe import Markup


@functools.cache
def vega() -> Markup:
    """Vega, Vega-Lite and Vega-Embed, of which the last is a global; bundling them takes seconds."""
    return _inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def tables() -> str:
    """DataTables, an ECMAScript module in base64."""
    return base64.b64encode(_of_itables("dt_bundle.js").encode()).decode()


def tables_style() -> Markup:
    """Of DataTables."""
    return Markup(_of_itables("dt_bundle.css"))


def own() -> Markup:
    """The page's own script."""
    return _inline((files(__package__) / "templates" / "report.js").read_text(encoding="utf-8"))


def _of_itables(name: str) -> str:
    return (files("itables") / "html" / name).read_text(encoding="utf-8")


def _inline(script: str) -> Markup:
    """A script that cannot end its element early, nor open a comment in it."""
    for text in ("</script", "<!--"):
        if text in script.lower():
            raise AssertionError(f"a script of the page holds {text!r}")
    return Markup(script)
