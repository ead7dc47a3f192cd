"""``python -m SymRegistrationLib``: the same as the ``symreg`` command."""

import contextlib
import os
import sys
from typing import NoReturn

from .commands import cli


def main() -> NoReturn:
    """Run one command and end the process with its exit code.

    At once: by then everything is written and every child has ended, and taking torch apart piece by piece would cost
    a user half a second more.
    """
    code = cli.main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever listened has gone, or closed it
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
