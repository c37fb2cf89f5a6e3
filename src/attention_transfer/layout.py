"""Where every file of a study lies: the one place that names them, beside dvc.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Folders of one study, relative to the repository's root, where every stage runs."""

    study: str

    @property
    def artifacts(self) -> Path:
        """Large outputs, kept by DVC."""
        return Path("runs") / self.study

    @property
    def metrics(self) -> Path:
        """Small records, kept in git."""
        return Path("metrics") / self.study

    @property
    def report(self) -> Path:
        return Path("reports") / self.study

    @property
    def images(self) -> Path:
        return self.artifacts / "data"

    @property
    def splits(self) -> Path:
        return self.artifacts / "splits"

    @property
    def shifts(self) -> Path:
        return self.artifacts / "shifts"

    @property
    def maps(self) -> Path:
        return self.artifacts / "maps"

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
        return self.artifacts / "cache" / teacher

    def cache_manifest(self, teacher: str) -> Path:
        """Fingerprints of all of a teacher's cached sets: what depends on the cache depends on this."""
        return self.cache(teacher) / "manifest.json"

    def resolved(self, run: str) -> Path:
        """What a run depends on: its resolved params and the hashes of what it uses of its teacher."""
        return self.artifacts / "resolved" / f"{run}.json"

    def student(self, run: str, seed: int) -> Path:
        return self.artifacts / "students" / run / str(seed)

    def predictions(self, run: str, seed: int) -> Path:
        return self.artifacts / "predictions" / run / str(seed)

    def record(self, stage: str, *instance: str | int) -> Path:
        """Folder of run.json, metrics.json and curve.csv of one stage instance."""
        return self.metrics.joinpath(stage, *map(str, instance))
