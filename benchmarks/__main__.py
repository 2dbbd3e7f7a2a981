"""`python -m benchmarks`: see `benchmarks.micro`."""

import sys

from benchmarks.micro import main

if __name__ == "__main__":
    sys.exit(main())
