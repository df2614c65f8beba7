"""`python -m benchmarks`: `wmengine bench`, run from the checkout."""

import sys

from wmengine.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    sys.exit(main())
