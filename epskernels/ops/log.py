"""The package's logger; EPSKERNELS_LOG=debug, or 1, gives it a handler."""

import logging
import os

log = logging.getLogger("epskernels")
is_logged, DEBUG = log.isEnabledFor, logging.DEBUG  # logging keeps the answer until some level changes: 40 ns a call
if os.environ.get("EPSKERNELS_LOG") in ("debug", "1"):
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    # What the program's own handlers print is not printed twice.
    _handler.addFilter(lambda record: all(record.levelno < other.level for other in logging.getLogger().handlers))
    log.addHandler(_handler)
    log.setLevel(logging.DEBUG)
