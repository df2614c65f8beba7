"""`python -m benchmarks.robustness`: `wmengine bench robustness`, run from the checkout."""

import sys

from wmengine.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "robustness"]
    sys.exit(main())
