"""``python -m ca2cl``, and ``accelerate launch ... -m ca2cl``."""

import sys

from ca2cl.cli import main

if __name__ == "__main__":
    sys.exit(main())
