"""`python -m kdcache` is the command `kdcache`."""

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]  # `python -m` puts the working directory first: in a stranger's folder its numpy.py would be ours

from kdcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
