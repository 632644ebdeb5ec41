"""Logs: structured, on stderr, readable on a terminal and JSON otherwise."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(level: str = "info") -> None:
    """Send structured logs to stderr from `level` (debug, info, warning, error, critical) on."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    terminal = sys.stderr.isatty()
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(pad_event_to=0)]
        if terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    structlog.configure(
        processors=[*common, *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard library: in our form, and errors only (httpx2 would log every URL).
    handler = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=common, processors=[remove, *render]))
    logging.basicConfig(level=max(logging.ERROR, threshold), handlers=[handler], force=True)


def get_logger(**context: object) -> structlog.typing.FilteringBoundLogger:
    """Return a logger with this context on every line."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**context)
    return logger
