"""`python -m ml.training --spec <file>`, see `command_line`."""

import sys

from ml.training.command_line import main

if __name__ == "__main__":
    sys.exit(main())
