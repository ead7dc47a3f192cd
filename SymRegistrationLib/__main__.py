"""``python -m SymRegistrationLib``: the same as the ``symreg`` command."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
