"""What a line of the log looks like, as text or as JSON, in the HTTP process and in an engine's; decides nothing else.

Whatever comes from clients can end no line and begin none.
"""

import json
import logging
import sys
from typing import Any, Literal

Format = Literal["text", "json"]
KNOWN = frozenset([*vars(logging.makeLogRecord({})), "message"])


def start(format: Format) -> None:
    """From now on, one line to stderr for each thing that happens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if format == "json" else Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, what was said beside it, and where it comes from."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "name": record.name,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | {"message": record.getMessage()} | _beside(record), default=str)


class Text(logging.Formatter):
    """One line; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The same for people."""
        beside = [f"{key}={value}" for key, value in _beside(record).items()]
        text = " ".join([self.formatTime(record, "%H:%M:%S"), record.getMessage(), *beside])
        line = text.encode("unicode_escape").decode()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _beside(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in KNOWN}
