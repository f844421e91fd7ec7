"""What the server of worker processes imports, once for all of them."""

import signal

from kd_lightning.startup import importing

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's; workers have their own

with importing():
    import kd_lightning.engine.trainer  # noqa: F401
