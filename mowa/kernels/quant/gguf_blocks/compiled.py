"""The searches of `search` and `refine` as loops for numba to compile, where it is installed: same bytes, less time.

The functions are plain Python over float32 numpy arrays, and run without numba too. The innermost loops go over LANES
groups, so that the compiler can use vector instructions and still add up each group in order. Arrays are
position-major: x[i, g] is weight i of group g.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

LANES = 64
ROUNDING_OFFSET = np.float32(12582912)  # 1.5 · 2²³: a float32 of this size has no fractional bits
ZERO, ONE, INFINITY, NAN = np.float32(0), np.float32(1), np.float32(np.inf), np.float32(np.nan)

# Rows of the work array of `affine`, [16, LANES]: of the group, of the candidate, of the best candidate.
HIGH, SUM_W, SUM_X = range(3)
ERROR, SCALE, MINIMUM, INVERSE, START = range(3, 8)
LEAST, BEST_SCALE, BEST_MINIMUM, BEST_INVERSE, BEST_START = range(8, 13)
SUM_L, SUM_L2, SUM_XL = range(13, 16)


class Kernels(NamedTuple):
    """`affine`, `symmetric` and `refine`, compiled."""

    affine: Callable[..., None]
    symmetric: Callable[..., None]
    refine: Callable[..., None]


_loaded: list[Kernels] = []


def load() -> bool:
    """Compile the searches for all later calls in this process, in about two seconds → False without numba."""
    if not _loaded and find_spec("numba") is not None:
        _loaded.append(_compile())
    return bool(_loaded)


def loaded() -> Kernels | None:
    """Return the compiled searches if `load` was called."""
    return _loaded[0] if _loaded else None


@cache
def _compile() -> Kernels:
    numba: Any = import_module("numba")
    options = {"nogil": True, "error_model": "numpy"}
    for part in (_round, _load_tile, _start_tile, _accumulate, _solve, _measure, _keep_better):
        import_module("numba.extending").register_jitable(**options)(part)
    return Kernels(*(numba.njit(**options)(function) for function in (affine, symmetric, refine)))


def affine(
    x: Array, weights: Array, divisions: Array, absolute: bool, scales: Array, minima: Array, codes: Array
) -> None:
    """Search as `search.search_affine`.

    Args:
        x, weights: [n, G].
        divisions: [C], the largest integer and then the divisions of the candidates.
        absolute: as in `AffineSearch`.
        scales, minima, codes: [G], [G] and [n, G], written.
    """
    top = divisions[0]
    shape, work = (len(x), LANES), np.zeros((16, LANES), np.float32)
    tile_x, tile_w, tile_codes = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for first in range(0, x.shape[1], LANES):
        count = min(LANES, x.shape[1] - first)
        _load_tile(x, weights, first, count, tile_x, tile_w)
        _start_tile(tile_x, tile_w, work)
        for candidate in range(len(divisions)):
            for g in range(LANES):
                work[START, g] = work[BEST_MINIMUM, g]
                inverse = divisions[candidate] / abs(work[HIGH, g] - work[START, g])
                work[SCALE, g], work[MINIMUM, g], work[ERROR, g] = ONE / inverse, work[START, g], ZERO
                work[INVERSE, g] = inverse if inverse < INFINITY else ZERO
            _accumulate(tile_x, tile_w, tile_codes, work, top)
            if candidate > 0:
                _solve(work)
            _measure(tile_x, tile_w, tile_codes, work, absolute)
            _keep_better(work, candidate == 0)
        for g in range(count):
            scales[first + g], minima[first + g] = work[BEST_SCALE, g], work[BEST_MINIMUM, g]
        for i in range(len(x)):
            for g in range(count):
                code = (tile_x[i, g] - work[BEST_START, g]) * work[BEST_INVERSE, g]
                codes[i, first + g] = _round(code, ZERO, top)


def symmetric(x: Array, weights: Array, inverse: Array, top: np.float32, scales: Array, codes: Array) -> None:
    """Search as `search.search_symmetric`.

    Args:
        x, weights: [n, G].
        inverse: [C, G], reciprocal step widths of the candidates.
        top: the largest integer is top - 1.
        scales, codes: [G] and [n, G], written; the integers are in -top … top - 1.
    """
    shape, work = (len(x), LANES), np.zeros((6, LANES), np.float32)
    tile_x, tile_w = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    trial, sum_xl, sum_l2, gain, scale, best = range(6)
    for first in range(0, x.shape[1], LANES):
        count = min(LANES, x.shape[1] - first)
        _load_tile(x, weights, first, count, tile_x, tile_w)
        for candidate in range(len(inverse)):
            for g in range(count):
                work[trial, g] = inverse[candidate, first + g]
            work[sum_xl], work[sum_l2] = ZERO, ZERO
            for i in range(len(x)):
                for g in range(LANES):
                    code = _round(tile_x[i, g] * work[trial, g], -top, top - ONE)
                    work[sum_xl, g] += tile_w[i, g] * tile_x[i, g] * code
                    work[sum_l2, g] += tile_w[i, g] * code * code
            for g in range(LANES):
                xl, l2 = work[sum_xl, g], work[sum_l2, g]
                better = candidate == 0 or xl * xl > work[gain, g] * l2
                new_scale = ZERO if candidate == 0 and l2 == ZERO else xl / l2
                work[scale, g] = new_scale if better else work[scale, g]
                work[gain, g] = new_scale * xl if better else work[gain, g]
                work[best, g] = work[trial, g] if better else work[best, g]
        for g in range(count):
            scales[first + g] = work[scale, g]
        for i in range(len(x)):
            for g in range(count):
                codes[i, first + g] = _round(tile_x[i, g] * work[best, g], -top, top - ONE)


def refine(
    x: Array, weights: Array, codes: Array, sum_xl: Array, sum_l2: Array, low: np.float32, high: np.float32
) -> None:
    """Refine integers as `refine._refine`, group by group; changes `codes` [n, G] and the sums [G]."""
    for g in range(x.shape[1]):
        xl, l2 = sum_xl[g], sum_l2[g]
        for _ in range(5):
            changed = False
            for i in range(len(x)):
                value, weight, old = x[i, g], weights[i, g], codes[i, g]
                new_xl, new_l2 = xl - weight * value * old, l2 - weight * old * old
                if not new_xl > ZERO:
                    continue
                new = _round(value * new_l2 / new_xl, low, high)
                new_xl, new_l2 = new_xl + weight * value * new, new_l2 + weight * new * new
                if new != old and new_l2 > ZERO and new_xl * new_xl * l2 > xl * xl * new_l2:
                    codes[i, g], xl, l2, changed = new, new_xl, new_l2, True
            if not changed:
                break
        sum_xl[g], sum_l2[g] = xl, l2


def _round(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Round to the nearest integer, ties to even, within limits."""
    rounded = value + ROUNDING_OFFSET - ROUNDING_OFFSET
    rounded = low if rounded < low else rounded
    return high if rounded > high else rounded


def _load_tile(x: Array, weights: Array, first: int, count: int, tile_x: Array, tile_w: Array) -> None:
    for i in range(len(x)):
        for g in range(count):
            tile_x[i, g], tile_w[i, g] = x[i, first + g], weights[i, first + g]


def _start_tile(tile_x: Array, tile_w: Array, work: Array) -> None:
    """Find the extremes of each group and add up its w and w x."""
    work[BEST_MINIMUM], work[HIGH] = tile_x[0], tile_x[0]
    work[SUM_W], work[SUM_X] = tile_w[0], tile_w[0] * tile_x[0]
    for i in range(1, len(tile_x)):
        for g in range(LANES):
            value = tile_x[i, g]
            work[BEST_MINIMUM, g] = value if value < work[BEST_MINIMUM, g] else work[BEST_MINIMUM, g]
            work[HIGH, g] = value if value > work[HIGH, g] else work[HIGH, g]
            work[SUM_W, g] += tile_w[i, g]
            work[SUM_X, g] += tile_w[i, g] * value
    for g in range(LANES):
        work[BEST_MINIMUM, g] = ZERO if work[BEST_MINIMUM, g] > ZERO else work[BEST_MINIMUM, g]


def _accumulate(tile_x: Array, tile_w: Array, tile_codes: Array, work: Array, top: np.float32) -> None:
    """Round with the candidate's step width, and add up w l, w l² and w l x."""
    work[SUM_L:] = ZERO
    for i in range(len(tile_x)):
        for g in range(LANES):
            code = _round((tile_x[i, g] - work[START, g]) * work[INVERSE, g], ZERO, top)
            tile_codes[i, g] = code
            weighted = tile_w[i, g] * code
            work[SUM_L, g] += weighted
            work[SUM_L2, g] += weighted * code
            work[SUM_XL, g] += weighted * tile_x[i, g]


def _solve(work: Array) -> None:
    """Solve the normal equations; the error is NaN where they have no solution."""
    for g in range(LANES):
        sum_w, sum_x, sum_l = work[SUM_W, g], work[SUM_X, g], work[SUM_L, g]
        sum_l2, sum_xl = work[SUM_L2, g], work[SUM_XL, g]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        work[SCALE, g] = sum_xl / sum_l2 if minimum > ZERO else scale
        work[MINIMUM, g] = ZERO if minimum > ZERO else minimum
        work[ERROR, g] = ZERO if determinant > ZERO else NAN


def _measure(tile_x: Array, tile_w: Array, tile_codes: Array, work: Array, absolute: bool) -> None:
    """Add up w (d l + m - x)², or w |d l + m - x|."""
    for i in range(len(tile_x)):
        if absolute:
            for g in range(LANES):
                error = tile_codes[i, g] * work[SCALE, g] + work[MINIMUM, g] - tile_x[i, g]
                work[ERROR, g] += tile_w[i, g] * abs(error)
        else:
            for g in range(LANES):
                error = tile_codes[i, g] * work[SCALE, g] + work[MINIMUM, g] - tile_x[i, g]
                work[ERROR, g] += tile_w[i, g] * (error * error)


def _keep_better(work: Array, always: bool) -> None:
    """Copy the candidate over the best one where its error is smaller."""
    for g in range(LANES):
        better = always or work[ERROR, g] < work[LEAST, g]
        work[LEAST, g] = work[ERROR, g] if better else work[LEAST, g]
        work[BEST_SCALE, g] = work[SCALE, g] if better else work[BEST_SCALE, g]
        work[BEST_MINIMUM, g] = work[MINIMUM, g] if better else work[BEST_MINIMUM, g]
        work[BEST_INVERSE, g] = work[INVERSE, g] if better else work[BEST_INVERSE, g]
        work[BEST_START, g] = work[START, g] if better else work[BEST_START, g]
