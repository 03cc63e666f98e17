"""Logging as one JSON object per line. Lines name deliveries and runs, never headers or bodies.

LOG.info("notification answered", extra={"delivery": "...", "run": "..."})
"""

import logging
import sys
from typing import TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

__all__ = ["LOG", "configure_logging", "json_formatter"]

LOG = logging.getLogger("trans_peft.bridge")


def json_formatter() -> logging.Formatter:
    """Return a formatter that writes time, level, logger, message and the fields of `extra`."""
    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "traceback"},
        timestamp="time",
        # uvicorn adds color_message, asyncio's tasks add taskName.
        reserved_attrs=[*RESERVED_ATTRS, "color_message", "taskName"],
    )


def configure_logging(stream: TextIO | None = None) -> None:
    """Write the logs of this process, warnings of libraries included, to a stream (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(json_formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in (LOG.name, "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
