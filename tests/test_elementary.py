"""The scalar programs behind scores and activations: errors against float64 and extended precision."""

import numpy as np
import pytest

from pyroute._array import elementary


@pytest.mark.parametrize(("dtype", "wide", "bound"), [("float32", "float64", 1.5), ("float64", "longdouble", 1.5)])
def test_exp_error(dtype, wide, bound, rng):
    info = np.finfo(dtype)
    low, high = np.log(float(info.tiny)) + 0.01, np.log(float(info.max)) - 0.01
    x = np.concatenate([rng.uniform(low, high, 500_000), rng.normal(0, 3, 500_000)]).astype(dtype)
    exact = np.exp(x.astype(wide))
    error = np.abs(elementary.exp(np, x).astype(wide) - exact) / exact
    assert float(error.max()) <= bound * float(info.eps) / 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_edges(dtype):
    x = np.array([0.0, -0.0, -np.inf, np.inf, np.nan, -1e30, 1e30], dtype)
    with np.errstate(all="ignore"):
        y = elementary.exp(np, x)
    np.testing.assert_array_equal(y, np.array([1, 1, 0, np.inf, np.nan, 0, np.inf], dtype))


def test_exp_keeps_subnormals():
    x = np.array([-88.0, -95.0, -103.0], np.float32)
    exact = np.exp(x.astype(np.float64))
    y = elementary.exp(np, x)
    assert (y > 0).all()
    assert (np.abs(y - exact) <= 0.51 * 2.0**-149 + 2.0**-23 * exact).all()


@pytest.mark.parametrize(("dtype", "wide"), [("float32", "float64"), ("float64", "longdouble")])
def test_log1p_relative_error(dtype, wide, rng):
    u = np.concatenate([rng.uniform(0, 1, 300_000), 10 ** rng.uniform(-30, 0, 300_000)]).astype(dtype)
    exact = np.log1p(u.astype(wide))
    error = np.abs(elementary.log1p_unit(u) - exact) / exact
    assert float(error.max()) <= 3.5 * float(np.finfo(dtype).eps) / 2


@pytest.mark.parametrize(("dtype", "wide"), [("float32", "float64"), ("float64", "longdouble")])
def test_log_error(dtype, wide, rng):
    x = np.concatenate([rng.uniform(1, 2000, 300_000), 1 + 10 ** rng.uniform(-6, 0, 300_000)]).astype(dtype)
    exact = np.log(x.astype(wide))
    error = np.abs(elementary.log_normal(x) - exact) / exact
    assert float(error.max()) <= 3.5 * float(np.finfo(dtype).eps) / 2
