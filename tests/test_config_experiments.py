"""Files of experiments: what they say for themselves, what they take from their study, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from attention_transfer import config
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout

PARAMS = Path(__file__).parents[1] / "params.yaml"
RUN = {
    "method": "copy",
    "teacher": "mae",
    "layers": [0],
    "learning_rate": 0.001,
    "epochs": 8,
    "batch_size": 50,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with one experiment."""
    study = yaml.safe_load(PARAMS.read_text(encoding="utf-8")) | {"name": "whole", "experiments": ["layers"]}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(study))
    write(tmp_path, experiment())
    return tmp_path


def experiment(**changes: Any) -> dict[str, Any]:
    values = {
        "extends": "../whole.yaml",
        "name": "whole/layers",
        "seeds": [0, 1],
        "runs": {"first": RUN},
        "ensembles": {},
        "evaluation": {"sets": ["test"]},
    }
    return values | changes


def write(folder: Path, values: dict[str, Any], name: str = "layers") -> Path:
    path = folder / "whole" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def refusal(path: Path) -> StudyError:
    with pytest.raises(StudyError) as caught:
        config.load(path)
    return caught.value


def test_an_experiment_has_its_own_runs_and_the_studys_data_and_teachers(folder: Path) -> None:
    study, found = config.load(folder / "whole.yaml"), config.load(folder / "whole" / "layers.yaml")
    assert list(found.runs) == ["first"]
    assert found.seeds == (0, 1)
    assert found.evaluation.sets == ("test",)
    assert found.report is None
    assert found.experiments == ()
    for shared in ("data", "views", "attention", "training", "teachers", "finetuned_teachers"):
        assert getattr(found, shared) == getattr(study, shared)
    assert found.evaluation.model_copy(update={"sets": study.evaluation.sets}) == study.evaluation
    assert config.experiments(folder / "whole.yaml") == {"layers": found}


def test_a_study_without_experiments_has_none() -> None:
    assert config.experiments(PARAMS) == {}


def test_the_studys_teachers_bind_its_experiments(folder: Path) -> None:
    path = write(folder, experiment(runs={"first": {**RUN, "layers": [6]}}))
    assert "runs.first.layers: [6] lie beyond" in str(refusal(path))
    assert refusal(path).where == str(path)


@pytest.mark.parametrize("key", ["views", "attention", "training", "teachers", "report", "experiments"])
def test_what_is_the_studys_is_refused_in_an_experiment(key: str, folder: Path) -> None:
    study = yaml.safe_load((folder / "whole.yaml").read_text())
    path = write(folder, experiment(**{key: study[key]}))
    assert f"{key}: is that of" in refusal(path).problem


def test_a_part_of_the_evaluation_is_refused_in_an_experiment(folder: Path) -> None:
    path = write(folder, experiment(evaluation={"sets": ["test"], "bootstrap": 3}))
    assert "evaluation.bootstrap: is that of" in refusal(path).problem


def test_data_of_its_own_are_said_key_by_key(folder: Path) -> None:
    study = config.load(folder / "whole.yaml")
    assert not study.own_data
    assert not config.load(folder / "whole" / "layers.yaml").own_data
    found = config.load(write(folder, experiment(data={"seed": 7, "labelled": 90})))
    assert found.own_data
    assert found.data == study.data.model_copy(update={"seed": 7, "labelled": 90})
    assert found.own_sections == ("data",)
    assert study.cached_teachers == ("mae",)


def test_with_data_of_its_own_its_views_and_its_way_to_attention_may_be_too(folder: Path) -> None:
    study = config.load(folder / "whole.yaml")
    path = write(
        folder, experiment(data={"labelled": 90}, attention={"source": "online"}, views={"flip": 0.0})
    )
    found = config.load(path)
    assert found.own_sections == ("data", "views", "attention")
    assert found.attention == study.attention.model_copy(update={"source": "online"})
    assert found.views == study.views.model_copy(update={"flip": 0.0})
    path = write(folder, experiment(data={"labelled": 90}, attention={"sauce": "online"}))
    assert "attention.sauce: unknown key; did you mean 'source'" in refusal(path).problem


def test_with_data_of_its_own_it_caches_the_teachers_of_its_runs_alone(folder: Path) -> None:
    study = yaml.safe_load((folder / "whole.yaml").read_text())
    study["teachers"]["second"] = study["teachers"]["mae"]
    (folder / "whole.yaml").write_text(yaml.safe_dump(study))
    path = write(folder, experiment(data={"seed": 7}, runs={"first": {**RUN, "teacher": "second"}}))
    assert config.load(path).cached_teachers == ("second",)
    path = write(folder, experiment(runs={"first": {**RUN, "teacher": "second"}}))
    assert config.load(path).cached_teachers == ("mae", "second")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"image_size": 14}}, "data.image_size: 14 is not the 28 that the teachers of"),
        ({"data": {"channels": 3}}, "data.channels: 3 is not the 1 that the teachers of"),
        ({"data": {"sead": 1}}, "data.sead: unknown key; did you mean 'seed'"),
        ({"data": None}, "data"),
        (
            {"data": {"seed": 1}, "evaluation": {"sets": ["test", "shifts"]}},
            "evaluation.sets: shifts are made of",
        ),
    ],
)
def test_data_that_do_not_fit_the_study_are_refused(
    changes: dict[str, Any], named: str, folder: Path
) -> None:
    assert named in refusal(write(folder, experiment(**changes))).problem


def test_with_data_of_its_own_it_has_no_teachers_name(folder: Path) -> None:
    study = yaml.safe_load((folder / "whole.yaml").read_text()) | {"experiments": ["mae"]}
    (folder / "whole.yaml").write_text(yaml.safe_dump(study))
    write(folder, experiment(name="whole/mae", data={"seed": 1}), "mae")
    with pytest.raises(StudyError, match="has a teacher of this name"):
        config.experiments(folder / "whole.yaml")


@pytest.mark.parametrize("key", ["seeds", "runs", "ensembles", "evaluation"])
def test_what_is_its_own_has_no_default(key: str, folder: Path) -> None:
    values = experiment()
    del values[key]
    missing = "evaluation.sets" if key == "evaluation" else key
    assert f"{missing}: is missing" in refusal(write(folder, values)).problem


def test_unknown_keys_and_values_are_named(folder: Path) -> None:
    assert "sedes: unknown key; did you mean 'seeds'" in refusal(write(folder, experiment(sedes=1))).problem
    assert "evaluation.sets" in refusal(write(folder, experiment(evaluation={"sets": ["tests"]}))).problem
    assert "evaluation" in refusal(write(folder, experiment(evaluation=3))).problem


@pytest.mark.parametrize("name", ["layers", "other/layers", "whole/layers/more", "whole/../other", 3, None])
def test_another_name_is_refused(name: Any, folder: Path) -> None:
    assert "name" in refusal(write(folder, experiment(name=name))).problem


def test_an_experiments_name_needs_a_study(folder: Path) -> None:
    study = yaml.safe_load((folder / "whole.yaml").read_text())
    (folder / "whole.yaml").write_text(yaml.safe_dump(study | {"name": "whole/layers"}))
    assert "has the key extends" in refusal(folder / "whole.yaml").problem


def test_an_experiment_extends_no_experiment(folder: Path) -> None:
    path = write(folder, experiment(extends="layers.yaml", name="whole/more"), "more")
    assert "extends another study itself" in refusal(path).problem


def test_a_missing_study_or_experiment_is_named(folder: Path) -> None:
    assert "none.yaml" in refusal(write(folder, experiment(extends="none.yaml"))).where
    (folder / "whole" / "layers.yaml").unlink()
    with pytest.raises(StudyError, match="does not exist") as caught:
        config.experiments(folder / "whole.yaml")
    assert caught.value.where == str(folder / "whole" / "layers.yaml")


def test_a_wrong_study_is_named_and_not_the_experiment(folder: Path) -> None:
    study = yaml.safe_load((folder / "whole.yaml").read_text())
    (folder / "whole.yaml").write_text(yaml.safe_dump(study | {"seeds": []}))
    assert refusal(folder / "whole" / "layers.yaml").where.endswith("whole.yaml")


def test_a_file_of_another_experiment_is_refused(folder: Path) -> None:
    write(folder, experiment(name="whole/heads"))
    with pytest.raises(StudyError, match="is not whole/layers"):
        config.experiments(folder / "whole.yaml")


@pytest.mark.parametrize("others", [["scratch"], ["first"]], ids=["of_the_study", "of_an_experiment"])
def test_a_run_has_one_name_in_the_whole_study(others: list[str], folder: Path) -> None:
    study = yaml.safe_load((folder / "whole.yaml").read_text()) | {"experiments": ["layers", "heads"]}
    (folder / "whole.yaml").write_text(yaml.safe_dump(study))
    write(folder, experiment(name="whole/heads", runs=dict.fromkeys(others, RUN)), "heads")
    with pytest.raises(StudyError, match="has a run of this name") as caught:
        config.experiments(folder / "whole.yaml")
    assert caught.value.where.endswith("heads.yaml")


def test_outputs_of_experiments_lie_apart_and_shared_files_in_one_place() -> None:
    study, layers, heads = map(Layout, ("whole", "whole/layers", "whole/heads"))
    for shared in ("images", "splits", "shifts", "finetuned_teachers", "metrics", "report", "artifacts"):
        assert getattr(study, shared) == getattr(layers, shared)
    assert study.cache("mae") == layers.cache("mae")
    assert study.teacher("mae") == layers.teacher("mae")
    places = [
        {
            layout.student("run", 0),
            layout.predictions("run", 0),
            layout.resolved("run"),
            layout.record("evaluate"),
        }
        for layout in (study, layers, heads)
    ]
    assert len(set.union(*places)) == 12
    # `evaluate` depends on this whole folder, so that it must not hold another experiment's.
    folders = [layout.predictions("run", 0).parents[1] for layout in (study, layers, heads)]
    assert not any(a != b and b.is_relative_to(a) for a in folders for b in folders)
    assert layers.record("train", "run", 0) == study.record("train", "run", 0)


def test_data_of_its_own_lie_apart_with_all_that_is_made_of_them() -> None:
    study, other, own = Layout("whole"), Layout("whole/layers"), Layout("whole/digits", own_data=True)
    for shared in ("shifts", "finetuned_teachers", "metrics", "report", "artifacts"):
        assert getattr(study, shared) == getattr(own, shared)
    assert own.teacher("mae") == study.teacher("mae")
    for layout in (study, other):
        assert (
            len(
                {own.images, own.splits, own.cache("mae")}
                | {layout.images, layout.splits, layout.cache("mae")}
            )
            == 6
        )
    assert own.record("data") == Path("metrics/whole/data/digits")
    assert own.record("cache", "mae") == Path("metrics/whole/cache/digits/mae")
    assert study.record("cache", "mae") == other.record("cache", "mae") == Path("metrics/whole/cache/mae")
    assert own.record("train", "run", 0) == study.record("train", "run", 0)
