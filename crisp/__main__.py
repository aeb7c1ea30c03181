"""`python -m crisp` is the `crisp` command."""

import sys

from crisp.cli import main

sys.exit(main())
