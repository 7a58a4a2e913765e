"""``python -m mda_lightning``: the command, where the script is not on the path."""

import sys

from mda_lightning.cli import main

sys.exit(main())
