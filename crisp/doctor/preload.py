"""Imported once, before the checks' processes are forked: each import takes seconds, and there are many checks.

What cannot be imported here is left to the checks that need it, which then fail with the reason. DALI is left to its
check: it starts threads.
"""

import contextlib
import importlib

for _module in ("torch", "twins", "data_checks", "training_checks", "rank_checks", "speed_checks"):
    with contextlib.suppress(Exception):  # not ImportError alone: a broken library raises whatever it likes
        importlib.import_module(_module if _module == "torch" else f"crisp.doctor.{_module}")
