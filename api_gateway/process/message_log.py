"""The log of messages, on standard error: as text for people, or as JSON objects for programs."""

import json
import logging
from datetime import UTC, datetime

from api_gateway.clients.api_keys import without_keys
from api_gateway.printable_text import printable
from api_gateway.settings.server import LogSection
from api_gateway.system.output import LineHandler, process_output

# Log messages of uvicorn that the gateway or its access log replaces.
_SILENCED = (
    "ASGI callable returned without completing response.",
    "Cancel %s running task(s)",
    "Application startup failed. Exiting.",
)


class TextFormatter(logging.Formatter):
    """Lines of text, which cannot affect a terminal whatever a peer has put into them."""

    def __init__(self, who: str) -> None:
        """`who` is a prefix that names the process."""
        super().__init__(f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of the base class
        """Return the line of a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802 - of the base class
        """Return the lines of a traceback."""
        return "\n".join(map(printable, super().formatException(ei).splitlines()))  # type: ignore[arg-type]


class JsonFormatter(logging.Formatter):
    """A JSON object for each record: time, level, logger, process, message, and the traceback if there is one."""

    def __init__(self, who: str) -> None:
        """`who` is a prefix that names the process."""
        super().__init__()
        self._process = {"process": who.rstrip(": ")} if who else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class MessageLog:
    """The settings of the log of this process, which a reload may change."""

    def __init__(self, who: str = "") -> None:
        """`who` is a prefix that names the process."""
        self._who = who
        self._handler = LineHandler(process_output().err, without_keys)

    def start(self, settings: LogSection) -> None:
        """Send all messages to standard error."""
        logging.basicConfig(handlers=[self._handler], force=True)
        # The gateway leaves a response incomplete if the upstream did; its own log has the reason.
        logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith(_SILENCED))
        self.apply(settings)

    def apply(self, settings: LogSection) -> None:
        """Set the level and the format."""
        self._handler.setFormatter((JsonFormatter if settings.format == "json" else TextFormatter)(self._who))
        logging.getLogger().setLevel(settings.level.upper())
        # The startup message replaces uvicorn's messages about its start and end; its errors are logged.
        logging.getLogger("uvicorn.error").setLevel("INFO" if settings.level == "debug" else "WARNING")


def configure_logging(settings: LogSection, who: str = "") -> None:
    """Log to standard error; `who` is a prefix that names the process."""
    global _log  # noqa: PLW0603 - a process has one log
    _log = MessageLog(who)
    _log.start(settings)


def change_logging(settings: LogSection) -> None:
    """Set the level and the format, unless another program has configured the log."""
    if _log is not None:
        _log.apply(settings)


_log: MessageLog | None = None
