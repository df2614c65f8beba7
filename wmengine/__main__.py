"""`python -m wmengine`: the command line."""

import sys

from wmengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
