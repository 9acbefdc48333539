"""`python -m climax_elevation`."""

import sys

from climax_elevation.cli import main

sys.exit(main())
