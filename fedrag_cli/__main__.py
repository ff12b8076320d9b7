"""`python -m fedrag_cli` is `fedrag`."""

import sys

from fedrag_cli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
