"""`crisp doctor`: what this machine has, and whether everything that CRISP does in two ways agrees on it.

`registry.py` lists the checks; `process.py` runs each in a process of its own; `report.py` writes what was found.
"""
