"""Where the spread of a score comes from: teachers, label draws, student seeds. NumPy and SciPy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Components:
    """Variances, in the square of the score's unit."""

    teacher: float
    """Between teachers."""
    draw: float
    """Between label draws."""
    interaction: float
    """Of teacher with draw."""
    seed: float
    """The residual: between student seeds of one teacher and one draw."""


@dataclass(frozen=True)
class VarianceComponents:
    """Estimates of a balanced crossed design with random effects."""

    mean: float
    """Over all cells."""
    standard_error: float
    """Of the mean, for new teachers, new draws and new seeds together, from the truncated components."""
    estimates: Components
    """Unbiased; one can be negative, which says that it is small against its own uncertainty."""
    truncated: Components
    """The same with 0 in place of a negative one: possible variances, but on average too large."""


def variance_components(values: npt.ArrayLike) -> VarianceComponents:
    """Method of moments in the two-way random model (Searle, Casella and McCulloch, 1992, chapter 4).

    values[i, j, k] = mean + teacher_i + draw_j + interaction_ij + seed_ijk, all independent, each of mean
    zero. The mean squares of the analysis of variance are set equal to their expectations. The squared
    standard error is teacher/a + draw/b + interaction/(a b) + seed/(a b c) with a teachers, b draws, c seeds.

    Student seeds count as drawn anew for each teacher and draw. If the runs of one seed have something in
    common across cells beyond that, the mean's standard error lacks its share.

    Args:
        values: (teachers, draws, seeds), at least 2 of each, finite.

    Raises:
        ValueError: values are not as above.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3 or min(array.shape) < 2:
        raise ValueError(f"values: expected (teachers, draws, seeds), at least 2 of each, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"values: expected finite values, got {array[~np.isfinite(array)].tolist()} too")
    teachers, draws, seeds = array.shape
    mean = float(array.mean())
    centred = array - mean  # sums of squares from large means would cancel
    cells = centred.mean(axis=2)
    of_teacher, of_draw = cells.mean(axis=1, keepdims=True), cells.mean(axis=0, keepdims=True)

    def mean_square(deviations: npt.NDArray[np.float64], repeats: int, freedom: int) -> float:
        return repeats * float(np.square(deviations).sum()) / freedom

    between_teachers = mean_square(of_teacher, draws * seeds, teachers - 1)
    between_draws = mean_square(of_draw, teachers * seeds, draws - 1)
    between_cells = mean_square(cells - of_teacher - of_draw, seeds, (teachers - 1) * (draws - 1))
    within_cells = mean_square(centred - cells[..., None], 1, teachers * draws * (seeds - 1))

    estimates = Components(
        teacher=(between_teachers - between_cells) / (draws * seeds),
        draw=(between_draws - between_cells) / (teachers * seeds),
        interaction=(between_cells - within_cells) / seeds,
        seed=within_cells,
    )
    truncated = Components(
        teacher=max(estimates.teacher, 0.0),
        draw=max(estimates.draw, 0.0),
        interaction=max(estimates.interaction, 0.0),
        seed=estimates.seed,
    )
    error = math.sqrt(
        truncated.teacher / teachers
        + truncated.draw / draws
        + (truncated.interaction + truncated.seed / seeds) / (teachers * draws)
    )
    return VarianceComponents(mean, error, estimates, truncated)
