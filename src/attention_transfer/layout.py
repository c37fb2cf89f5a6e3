"""Where every file of a study lies: the one place that names them, beside dvc.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pydantic takes a third of a second, and not every command needs it
    from attention_transfer.config import Study


@dataclass(frozen=True)
class Layout:
    """Folders of one study, relative to the repository's root, where every stage runs.

    An experiment, such as `full/layers`, shares images, splits, teachers, caches and shifts with its study, `full`,
    and its records lie among the study's; what its runs make lies apart, so that no stage waits for the runs of
    another experiment. One with data of its own has images, splits and caches of its own as well.

    Attributes:
        study: its name in params.yaml.
        own_data: an experiment's, see `config.Study`.
    """

    study: str
    own_data: bool = False

    @classmethod
    def of(cls, study: Study) -> Layout:
        return cls(study.name, study.own_data)

    @property
    def base(self) -> str:
        """The study that an experiment extends; a study without a slash is its own."""
        return self.study.partition("/")[0]

    @property
    def experiment(self) -> str:
        """Empty for a study itself."""
        return self.study.partition("/")[2]

    @property
    def artifacts(self) -> Path:
        """Large outputs, kept by DVC."""
        return Path("runs") / self.base

    @property
    def own(self) -> Path:
        """Large outputs of the runs."""
        return self.artifacts / "experiments" / self.experiment if self.experiment else self.artifacts

    @property
    def _with_data(self) -> Path:
        """Where images lie, and what is made of them alone or of them and a teacher."""
        return self.own if self.own_data else self.artifacts

    @property
    def metrics(self) -> Path:
        """Small records, kept in git."""
        return Path("metrics") / self.base

    @property
    def report(self) -> Path:
        return Path("reports") / self.base

    @property
    def images(self) -> Path:
        return self._with_data / "data"

    @property
    def splits(self) -> Path:
        return self._with_data / "splits"

    @property
    def shifts(self) -> Path:
        return self.artifacts / "shifts"

    @property
    def maps(self) -> Path:
        return self.own / "maps"

    def teacher(self, name: str) -> Path:
        return self.artifacts / "teachers" / name

    def teacher_weights(self, name: str) -> Path:
        return self.teacher(name) / "model.safetensors"

    @property
    def finetuned_teachers(self) -> Path:
        return self.artifacts / "finetuned"

    def finetuned_teacher(self, name: str) -> Path:
        """A teacher with a classification head."""
        return self.finetuned_teachers / name

    def cache(self, teacher: str) -> Path:
        return self._with_data / "cache" / teacher

    def cache_manifest(self, teacher: str) -> Path:
        """Fingerprints of all of a teacher's cached sets: what depends on the cache depends on this."""
        return self.cache(teacher) / "manifest.json"

    def resolved(self, run: str) -> Path:
        """What a run depends on: its resolved params and the hashes of what it uses of its teacher."""
        return self.own / "resolved" / f"{run}.json"

    def student(self, run: str, seed: int) -> Path:
        return self.own / "students" / run / str(seed)

    def export(self, run: str, seed: int) -> Path:
        """Where a copy of a student goes that leaves the study: no stage's output."""
        return Path("exports") / self.study / f"{run}-{seed}"

    def predictions(self, run: str, seed: int) -> Path:
        return self.own / "predictions" / run / str(seed)

    def record(self, stage: str, *instance: str | int) -> Path:
        """Folder of run.json, metrics.json and curve.csv of one stage instance.

        Runs have one name in the whole study; what else an experiment has for itself is told apart by its name.
        """
        own = not instance or (stage == "cache" and self.own_data)
        return self.metrics.joinpath(
            stage, *filter(None, [self.experiment if own else ""]), *map(str, instance)
        )
