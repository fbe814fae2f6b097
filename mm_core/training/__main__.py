"""`python -m mm_core.training`: see `release/commands.py`."""

import sys

from ..release.commands import main

if __name__ == "__main__":
    sys.exit(main())
