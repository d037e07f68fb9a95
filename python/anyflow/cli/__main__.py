"""``python -m anyflow.cli``: the same as the command ``anyflow``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
