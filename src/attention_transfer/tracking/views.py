"""Ready views of a study in the MLflow UI: filter, groups and charts, which its menu Views lists and links open.

MLflow keeps a saved view as a tag of the experiment: a name and the state of its page, deflated. Children of a run are
folded in its pages until somebody unfolds them, and charts of a folded study are empty; a view groups them by run.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attention_transfer.tracking.database import Store

TAG = "mlflow.sharedViewState."
KIND, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
"""By default the pages are those for language models: traces, judges, prompts."""
MAIN = "main"
"""Tag `experiment` of the runs that are in none."""


def save(store: Store, study: str, experiments: Iterable[str]) -> None:
    """Saves the views of a study's experiments; those that are there and the same are left alone.

    Args:
        experiments: by name, MAIN for the runs of none.
    """
    tags = store.client.get_experiment(store.experiment).tags
    fresh = {KIND: MODEL_TRAINING}
    for experiment in experiments:
        for view, (title, state) in _views(study, experiment).items():
            key = TAG + share_key(study, experiment, view)
            if _content(tags.get(key)) != (title, state):
                fresh[key] = _packed(title, state)
    for key, value in fresh.items():
        if tags.get(key) != value:
            store.client.set_experiment_tag(store.experiment, key, value)


def links(address: str, study: str, experiment: str = MAIN, mlflow_experiment: str = "1") -> dict[str, str]:
    """By title, the addresses of a study's views.

    Args:
        address: of the UI, such as http://127.0.0.1:5000.
        mlflow_experiment: MLflow's id; it is 1 in a database that `connect` has made.
    """
    return {
        title: f"{address}/#/experiments/{mlflow_experiment}/runs"
        f"?viewStateShareKey={share_key(study, experiment, view)}&compareRunsMode=CHART"
        for view, (title, _) in _views(study, experiment).items()
    }


def share_key(study: str, experiment: str, view: str) -> str:
    """What a view's link and its tag name it by."""
    return re.sub(r"[^\w.-]", "-", "-".join((study, experiment, view)))  # what MLflow allows in a tag's name


def _views(study: str, experiment: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: title and state."""
    place = study if experiment == MAIN else f"{study}/{experiment}"
    condition = f"tags.study = '{study}' AND tags.experiment = '{experiment}' AND tags.stage = 'train'"
    comparison = {
        "Accuracy": [_bar("test_accuracy"), _bar("validation_accuracy")],
        "Learning curves": [_line("validation_accuracy"), _line("task_loss"), _line("attention_loss")],
    }
    shift = {
        "Under distribution shift": [_bar("shift_accuracy"), _scatter("test_accuracy", "shift_accuracy")]
    }
    cost = {"Cost": [_bar("seconds_per_step"), _bar("peak_memory_mb"), _bar("seconds")]}
    found = {
        "comparison": (
            f"{place}: comparison",
            _state(condition, comparison, ["test_accuracy", "validation_accuracy"]),
        ),
        "cost": (
            f"{place}: cost",
            _state(condition, cost, ["seconds_per_step", "peak_memory_mb", "seconds"]),
        ),
    }
    if experiment == MAIN:
        found["shift"] = (f"{place}: shift", _state(condition, shift, ["test_accuracy", "shift_accuracy"]))
    return found


def _state(
    condition: str, sections: Mapping[str, Sequence[dict[str, Any]]], columns: Sequence[str]
) -> dict[str, Any]:
    """Runs that meet a condition, a group for each name of a run: its seeds' mean."""
    return {
        "searchFilter": condition,
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"metrics.`{column}`" for column in columns],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": [
            {"uuid": f"{title}-{place}", "metricSectionId": title} | COMMON | chart
            for title, charts in sections.items()
            for place, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": title, "name": title, "display": True, "isReordered": False}
            | {"deleted": False, "isGenerated": False}
            for title in sections
        ],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "run"}]},
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


COMMON = {"deleted": False, "isGenerated": False, "runsCountToCompare": 30}


def _bar(metric: str) -> dict[str, Any]:
    return {"type": "BAR", "metricKey": metric, "displayName": _spoken(metric)}


def _line(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "displayName": _spoken(metric),
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
    }


def _scatter(x: str, y: str) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "xaxis": {"key": x, "type": "METRIC"},
        "yaxis": {"key": y, "type": "METRIC"},
        "displayName": f"{_spoken(y)} against {_spoken(x)}",
    }


def _spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _packed(title: str, state: Mapping[str, Any]) -> str:
    deflated = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": title, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{deflated}"})


def _content(tag: str | None) -> tuple[str, Any] | None:
    """Title and state of a saved view; None where there is none that can be read."""
    try:
        saved = json.loads(tag or "")
        state = base64.b64decode(saved["state"].removeprefix("deflate;"))
        return saved["name"], json.loads(zlib.decompress(state))
    except (ValueError, KeyError, TypeError, zlib.error):
        return None
