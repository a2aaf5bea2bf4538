"""`python -m kdcache` is the command `kdcache`."""

import sys

from kdcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
