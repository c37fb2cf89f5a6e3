"""Heat maps show the means of the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic_records as synthetic

from attention_transfer.reporting import similarity_figures
from attention_transfer.reporting.records import Records, load


@pytest.fixture
def records(tmp_path: Path) -> Records:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    return load(study, metrics)


def test_each_panel_is_a_run_against_its_reference(records: Records) -> None:
    assert records.study.report is not None
    cka, divergence = similarity_figures.build(records, records.study.report)
    panels = [axes for axes in cka.figure.axes if axes.get_xlabel()]
    matrices = [np.asarray(axes.images[0].get_array()) for axes in panels]
    # Four runs against their teacher and against the fine-tuned student, itself of another seed.
    assert len(matrices) == 4 + 4
    layers = np.arange(synthetic.DEPTH)
    expected = 1 - layers[:, None] / 10 - abs(layers[:, None] - layers) / 50
    np.testing.assert_allclose(matrices[0], expected)
    tables = [np.asarray(axes.images[0].get_array()) for axes in divergence.figure.axes if axes.get_title()]
    assert [table.shape for table in tables] == [(4, 6)] * 4
    np.testing.assert_allclose(tables[0], 0.1 + np.mean(records.study.seeds) / 100)
    np.testing.assert_allclose(tables[1], 0.05)


def test_without_test_images_there_is_nothing(records: Records) -> None:
    assert records.study.report is not None
    nothing = Records(**{**records.__dict__, "similarity": records.similarity.iloc[:0]})
    assert similarity_figures.build(nothing, records.study.report) == []
