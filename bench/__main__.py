"""`python -m bench`."""

import signal
import sys

from bench.cli import main

if __name__ == "__main__":
    # A scheduler's time limit, or a closed terminal, ends a run as Ctrl-C does: what is finished is kept.
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(name, signal.default_int_handler)
    sys.exit(main())
