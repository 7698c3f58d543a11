"""The command line: ``python -m annulus run ...``, the same program as ``annulus run ...``."""

import os
import sys


def program():
    """The path of the program inside the package."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bin", "annulus")


def main():
    path = program()
    try:
        os.execv(path, [path, *sys.argv[1:]])
    except OSError as error:
        print(f"annulus: IO_ERROR: cannot start {path}: {error.strerror}", file=sys.stderr)
        print("fix: install the package again", file=sys.stderr)
        return 74


if __name__ == "__main__":
    sys.exit(main())
