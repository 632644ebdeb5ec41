"""Logs: structured, on stderr, readable on a terminal and JSON otherwise."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

__all__ = ["configure_logging", "get_logger", "kafka_logger"]


def configure_logging(level: str = "info") -> None:
    """Send structured logs to stderr from `level` (debug, info, warning, error) on."""
    terminal = sys.stderr.isatty()
    render: list[Any] = (
        [structlog.dev.ConsoleRenderer(pad_event_to=0)]
        if terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries that log through the standard library: warnings and worse only, httpx would log every URL.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


def get_logger(**context: Any) -> structlog.typing.FilteringBoundLogger:
    """Return a logger with this context on every line."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**context)
    return logger


def kafka_logger() -> logging.Logger:
    """Return the logger that librdkafka's own lines go to: shown from warnings on."""
    logger = logging.getLogger("librdkafka")
    logger.setLevel(logging.WARNING)
    return logger
