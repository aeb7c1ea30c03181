"""How functions are compiled: by Numba, without the GIL, once per machine."""

import logging
from collections.abc import Callable
from typing import Any

import numba

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """`function`, compiled at its first call; the plain Python stays at `.py_func`.

    The machine code is kept beside the source, or where that is read-only in the user's cache folder, or in
    $NUMBA_CACHE_DIR if set. Where none of these can be written every process compiles anew, about a second each.

    What is kept is renewed when the function's own file changes, not when a compiled function of another file that
    it calls does: after editing such a file, delete __pycache__/*.nb?.
    """
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError as error:  # "no locator available"
        log.warning(
            "%s: compiled anew by every process (%s); set NUMBA_CACHE_DIR to a writable folder",
            function.__qualname__, error,
        )  # fmt: skip
        return numba.njit(function, nogil=True)
