"""Format of log lines, as text or as JSON, in the HTTP process and in the engine processes.

Text from clients is escaped: it can neither end a log line nor begin one.
"""

import json
import logging
import sys
from typing import Any, Literal

Format = Literal["text", "json"]
STANDARD_FIELDS = frozenset([*vars(logging.makeLogRecord({})), "message"])


def start(format: Format) -> None:
    """Send all log records to stderr, one line each, in the given format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """Formatter that writes one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, logger, message, extra fields and traceback of a record as JSON."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "name": record.name,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line["message"] = record.getMessage()
        return json.dumps(line | _extra_fields(record), default=str)


class TextFormatter(logging.Formatter):
    """Formatter that writes one line of text; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, message and extra fields of a record as text."""
        extra = [f"{key}={value}" for key, value in _extra_fields(record).items()]
        text = " ".join([self.formatTime(record, "%H:%M:%S"), record.getMessage(), *extra])
        line = text.encode("unicode_escape").decode()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that the caller passed to the logger as ``extra``."""
    return {key: value for key, value in vars(record).items() if key not in STANDARD_FIELDS}
