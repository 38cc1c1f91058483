"""Logs: lines for people, or JSON with the request's id for machines."""

from __future__ import annotations

import json
import logging
import sys

from serving import audit
from serving.middleware import request_id
from serving.settings import Settings


class JsonLines(logging.Formatter):
    """One JSON object a line; a line that is an object already is merged in."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, request id and message."""
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        fields = getattr(record, "fields", None)
        line |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logs(settings: Settings) -> None:
    """Sends our loggers to stderr; requests are lines of level info, audit lines always come."""
    logger = logging.getLogger("sieve")
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(settings.log_level.upper())
    audit_lines = logging.StreamHandler(sys.stderr)
    audit_lines.setFormatter(JsonLines())
    audit.logger.handlers = [audit_lines]
    audit.logger.propagate = False
