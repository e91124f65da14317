"""Routines of BLAS and LAPACK that let other threads run.

scipy's own wrappers of them hold the interpreter's lock, so a pool of threads gains nothing by them; here the same compiled
routines are called through `ctypes`, which releases it. scipy publishes their addresses for exactly such callers
(`scipy.linalg.cython_blas`, `cython_lapack`).
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack  # pyright: ignore[reportAttributeAccessIssue]

_LETTER = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}


def add_gram(rows: NDArray[Any], sums: NDArray[Any]) -> None:
    """Add `rows.T @ rows` to the lower triangle of `sums`, in place; half of a product's work.

    rows: `[m, n]`, contiguous in either order. sums: `[n, n]`, contiguous in Fortran's order. Both float32, or both float64.
    """
    count, n = rows.shape
    turned = not rows.flags.f_contiguous  # seen in Fortran's order such rows are columns
    assert sums.shape == (n, n)
    assert sums.flags.f_contiguous
    assert rows.dtype == sums.dtype
    assert rows.flags.f_contiguous or rows.flags.c_contiguous
    _call(
        cython_blas,
        "syrk",
        sums.dtype,
        "L",
        "N" if turned else "T",
        n,
        count,
        1.0,
        rows,
        n if turned else count,
        1.0,
        sums,
        n,
    )


def top_eigenvectors(symmetric: NDArray[Any], count: int) -> NDArray[Any]:
    """The eigenvectors `[n, count]` of the `count` largest eigenvalues, in ascending order of those.

    symmetric: `[n, n]` in Fortran's order, float32 or float64; the lower triangle is read, and destroyed.
    Only the wanted vectors are formed. Raises ArithmeticError where LAPACK does not converge.
    """
    n, dtype = len(symmetric), symmetric.dtype
    assert symmetric.shape == (n, n)
    assert symmetric.flags.f_contiguous
    assert 1 <= count <= n
    values, vectors = np.empty(n, dtype), np.empty((n, count), dtype, order="F")
    found, info, support = np.zeros(1, np.intc), np.zeros(1, np.intc), np.empty(2 * n, np.intc)
    work, whole = np.empty(1, dtype), np.empty(1, np.intc)
    for length, whole_length in ((-1, -1), (None, None)):  # ask for the room, then work
        if length is None:
            work, whole = np.empty(int(work[0]), dtype), np.empty(int(whole[0]), np.intc)
            length, whole_length = len(work), len(whole)
        _call(
            cython_lapack, "syevr", dtype, "V", "I", "L", n, symmetric, n, 0.0, 0.0, n - count + 1, n, 0.0, found, values,
            vectors, n, support, work, length, whole, whole_length, info,
        )  # fmt: skip
    if info[0] or found[0] != count:
        raise ArithmeticError(f"the eigenvectors of a {n}x{n} matrix did not converge (LAPACK says {info[0]})")
    return vectors


def eigensystem(symmetric: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """All eigenvalues `[n]`, ascending, and the eigenvectors `[n, count]` of the `count` largest, in the order of those.

    symmetric: as for `top_eigenvectors`. The reduction to tridiagonal form, which is nearly all of the work, is done once for both.
    Raises ArithmeticError where LAPACK does not converge.
    """
    n, dtype = len(symmetric), symmetric.dtype
    assert symmetric.shape == (n, n)
    assert symmetric.flags.f_contiguous
    assert 1 <= count <= n
    values, beside, scales = np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype)
    vectors, top = np.empty((n, count), dtype, order="F"), np.empty(n, dtype)
    found, info, support, exact = (
        np.zeros(1, np.intc),
        np.zeros(1, np.intc),
        np.empty(2 * n, np.intc),
        np.ones(1, np.intc),
    )

    def worked(name: str, *arguments: Any) -> None:
        """Ask for the room, then work in it."""
        work = np.empty(1, dtype)
        _call(cython_lapack, name, dtype, *arguments, work, -1, info)
        work = np.empty(int(work[0]), dtype)
        _call(cython_lapack, name, dtype, *arguments, work, len(work), info)
        _converged(info)

    worked("sytrd", "L", n, symmetric, n, values, beside, scales)
    diagonal, off = values.copy(), beside.copy()
    _call(cython_lapack, "sterf", dtype, n, values, beside, info)
    _converged(info)
    work, whole = np.empty(18 * n, dtype), np.empty(10 * n, np.intc)
    _call(
        cython_lapack, "stemr", dtype, "V", "I", n, diagonal, off, 0.0, 0.0, n - count + 1, n, found, top, vectors, n, count,
        support, exact, work, len(work), whole, len(whole), info,
    )  # fmt: skip
    _converged(info)
    if found[0] != count:
        raise ArithmeticError(f"{found[0]} of {count} eigenvectors of a {n}x{n} matrix were found")
    worked("ormtr", "L", "L", "N", n, count, symmetric, n, scales, vectors, n)
    return values, vectors


def _converged(info: NDArray[Any]) -> None:
    if info[0]:
        raise ArithmeticError(f"the eigenvalues of a matrix did not converge (LAPACK says {info[0]})")


def _call(library: Any, name: str, dtype: np.dtype[Any], *arguments: Any) -> None:
    """Call a routine as Fortran does: every argument by its address."""
    real = ctypes.c_double if dtype == np.float64 else ctypes.c_float
    held = []
    for value in arguments:
        if isinstance(value, np.ndarray):
            held.append(ctypes.c_void_p(value.ctypes.data))
        else:
            kind = {str: ctypes.c_char, int: ctypes.c_int, float: real}[type(value)]
            held.append(ctypes.byref(kind(value.encode() if isinstance(value, str) else value)))
    _routine(library, _LETTER[dtype] + name, len(held))(*held)


@cache
def _routine(library: Any, name: str, count: int) -> Any:
    capsule = library.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(address)
