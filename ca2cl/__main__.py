"""``python -m ca2cl VERB …`` and ``accelerate launch … -m ca2cl pretrain …``."""

import sys

from ca2cl.cli import main

if __name__ == "__main__":
    sys.exit(main())
