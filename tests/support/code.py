"""``python -c CODE ARGUMENTS``, for ``tests.support.forked``: what the code imports is there already."""

import sys

if __name__ == "__main__":
    code = sys.argv.pop(1)
    sys.argv[0] = "-c"
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
