"""Imported once, before the checks' processes are forked: each import takes seconds, and there are many checks.

What cannot be imported here is left to the checks that need it, which then fail with the reason.
"""

import contextlib

with contextlib.suppress(Exception):  # not ImportError alone: a broken library raises whatever it likes
    import torch  # noqa: F401

with contextlib.suppress(Exception):
    import crisp.benchmarks.loader_rate
    import crisp.benchmarks.step_contenders  # noqa: F401
