"""``python -m vllmd.simengine``."""

import sys

from vllmd.simengine.options import main_options
from vllmd.simengine.server import run

if __name__ == "__main__":
    sys.exit(run(main_options()))
