"""``python -m ca2cl``, and ``accelerate launch ... -m ca2cl``."""

import sys

if __name__ == "__main__":  # processes that the job starts import this module, and run something else
    from ca2cl.cli import main

    sys.exit(main())
