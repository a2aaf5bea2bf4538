"""An S3-compatible server in a process of its own, for as long as its standard input is open. Prints its port.

Not in the tests' process: vLLM looks through all modules that are loaded there, and Flask's objects do not stand it.
"""

from __future__ import annotations

import logging
import sys

from moto.server import ThreadedMotoServer


def main() -> None:
    """Serve on a free port until standard input ends, which it also does when the process that started this one dies."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
