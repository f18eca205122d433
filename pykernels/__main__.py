"""``python -m pykernels``: the command line."""

import sys

from pykernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
