"""`python -m sdfserver` is the command `sdfserver`."""

import sys

from sdfserver.cli import main

sys.exit(main())
