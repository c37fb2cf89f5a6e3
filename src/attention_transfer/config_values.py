"""What the sections of params.yaml are made of: kinds of values, and relations between them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
"""A name becomes a folder, a stage and a label: lower-case letters, digits and underscores."""
StudyName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}(/[a-z][a-z0-9_]{0,39})?$")]
"""An experiment of a study is called <study>/<experiment>."""
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=10)]


class Section(BaseModel):
    """Frozen; a key that is not declared here is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Extended(Section):
    """A section with keys that came later: left out, they stand in no record, and change no fingerprint."""

    later: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_what_is_left_out(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            key: value
            for key, value in written(self).items()
            if key not in self.later or getattr(self, key) != fields[key].default
        }


def divides(key: str, part: int, whole_key: str, whole: int) -> None:
    """ValueError unless one value is a multiple of another."""
    if whole % part:
        raise ValueError(f"{key}: {part} does not divide {whole_key}, {whole}")


def no_value_twice(key: str, values: tuple[Any, ...]) -> None:
    """ValueError if a list holds a value twice."""
    if len(set(values)) != len(values):
        raise ValueError(f"{key}: {list(values)} names a value twice")


def ordered(key: str, limits: tuple[float, float]) -> None:
    """ValueError unless the first is at most the second."""
    if limits[0] > limits[1]:
        raise ValueError(f"{key}: the smallest value, {limits[0]}, is larger than the largest, {limits[1]}")


def warms_up(warmup_epochs: float, epochs: int) -> None:
    """ValueError unless the warm-up ends before the training."""
    if warmup_epochs >= epochs:
        raise ValueError(f"warmup_epochs: {warmup_epochs} is not below epochs, {epochs}")
