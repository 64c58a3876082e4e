"""Idem: enrol people by face, find those who enrol twice, authenticate by selfie, prove who did what."""

import os
import signal

# One thread per photo or search, as many side by side as cores: threads inside each only fight. With OpenBLAS's own,
# turning a gallery's first vector cost seven times the processor time, and seconds on a busy machine. Read when numpy
# is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The kernel ignores SIGTERM for process 1 of a container until the process has a handler. Imports and `--wait` come before the
# servers' own handlers.
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
