"""`python -m ecar` is the console script `ecar`."""

import sys

from ecar.cli import main

sys.exit(main())
