"""Logs, a JSON object a line: what happened, to which delivery and run. Never a header or a body.

LOG.info("hint answered", extra={"delivery": "...", "run": "..."})
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

__all__ = ["LOG", "JsonLines", "log_to"]

LOG = logging.getLogger("trans_peft.bridge")
_ORDINARY = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    """A record as JSON; what was given as `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _ORDINARY},
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def log_to(stream: Any = None) -> None:
    """Send the logs of this process, the libraries' warnings too, to a stream (standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in (LOG.name, "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
