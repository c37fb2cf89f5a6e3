"""Number formats: rounding against a naive oracle, its error bound, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from attention_transfer.transfer.quantisation import rounded, stored

LARGEST = 127 * 65504.0  # of int8: the largest scale is the largest float16

vectors = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    # Each magnitude as likely as the others: from zero and subnormal numbers to the largest.
    elements=st.builds(
        lambda mantissa, exponent: float(np.float32(mantissa * 10.0**exponent)),
        st.floats(-1, 1, width=32),
        st.integers(-45, 6),
    ),
)


def naive_int8(vector: np.ndarray) -> tuple[np.ndarray, float]:
    """One vector as it must come back, and its scale: the smallest float16 that reaches 127 steps."""
    wanted = np.abs(vector).max() / np.float32(127)
    scale = np.float16(wanted)
    if float(scale) < float(wanted):
        scale = np.nextafter(scale, np.float16(np.inf))
    if scale == 0:
        return np.zeros(vector.shape, np.float32), 0.0
    return np.rint(vector / np.float32(scale)).astype(np.float32) * np.float32(scale), float(scale)


@settings(deadline=None)
@given(values=vectors)
def test_int8_is_a_scale_times_the_nearest_integers(values: np.ndarray) -> None:
    found = rounded(torch.from_numpy(values), "int8")
    assert found.dtype == torch.float32
    for vector, result in zip(values, found.numpy(), strict=True):
        expected, scale = naive_int8(vector)
        np.testing.assert_array_equal(result, expected)
        # Half a scale, which is 1/127 of the largest value and at most one in the last place more.
        # Below 2**-143, 1/127 of the largest value is zero in float32.
        assert np.abs(result - vector.astype(np.float64)).max() <= 0.5 * scale * (1 + 1e-6) + 2.0**-143
        assert scale <= float(np.abs(vector).max()) / 127 * (1 + 2**-10) + 2.0**-24
    numbers = stored(torch.from_numpy(values), "int8").numbers
    assert numbers.dtype == torch.int8
    assert numbers.min() >= -127


@settings(deadline=None)
@given(values=vectors, dtype=st.sampled_from(["float16", "float32", "int8"]))
def test_a_vector_is_rounded_for_itself(values: np.ndarray, dtype: str) -> None:
    """Whatever stands beside it: so rows are the same in any batch, and layers in any choice of them."""
    together = rounded(torch.from_numpy(values), dtype)  # type: ignore[arg-type]
    for vector, result in zip(torch.from_numpy(values), together, strict=True):
        assert torch.equal(rounded(vector, dtype).nan_to_num(), result.nan_to_num())  # type: ignore[arg-type]


@pytest.mark.parametrize("given_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_is_taken(given_dtype: torch.dtype) -> None:
    values = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)).to(given_dtype)
    for dtype in ("float16", "float32", "int8"):
        assert torch.equal(rounded(values, dtype), rounded(values.float(), dtype))  # type: ignore[arg-type]
    assert torch.equal(rounded(values, "float16"), values.half())
    assert torch.equal(rounded(values, "float32"), values.float())


def test_the_largest_int8_comes_back() -> None:
    values = torch.tensor([[LARGEST, -LARGEST, 65504.0, 0.0]])
    assert torch.equal(rounded(values, "int8"), values)


@pytest.mark.parametrize("value", [1.001 * LARGEST, 3e38, float("inf"), float("nan")])
def test_what_does_not_fit_int8_makes_its_vector_not_finite_and_spares_the_others(value: float) -> None:
    values = torch.ones(2, 3)
    values[1, 2] = value
    result = stored(values, "int8")
    assert result.finite().tolist() == [True, False]
    assert not result.floats()[1].isfinite().any()
    assert torch.allclose(result.floats()[0], values[0], rtol=2**-10)
