"""`python -m veriattn`: the command line."""

import sys

from veriattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
