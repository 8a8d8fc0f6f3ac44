"""A process of several that starts, says so, and then stays, dies or hangs, as it is told."""

import os
import signal
import sys
import time

from intraslice_jax.config import ParallelConfig
from intraslice_jax.parallel import distributed

port, number, fate = sys.argv[1:]
distributed.start(
    ParallelConfig(
        coordinator=f"localhost:{port}",
        num_processes=2,
        process_id=int(number),
        startup_timeout=20 if fate != "alone" else 2,
        peer_timeout=3,
    )
)
print("started", flush=True)
if fate == "die":
    time.sleep(1.5)  # long enough to have been seen alive
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "fail":
    distributed.abandon("the text is gone", 2)
time.sleep(60)
