"""Every error the product raises on purpose, grouped by what the caller does about it.

BourseError
├─ ConfigurationError          the operator must change something: printed, exit 2
│  └─ Unreachable              broker or registry does not answer: a service waits, a command ends
├─ ExchangeError
│  ├─ ExchangeUnavailable      keep polling, back off
│  ├─ ExchangeRefused          token, scope, quota: `kind` is which
│  └─ ExchangeNonsense         keep the body, count, skip this poll
├─ SchemaIncompatible          refuse to start
├─ Undecodable                 one record cannot be decoded: dead-letter it
│  └─ UnknownSchema            the registry does not know its schema: restore the registry, not the record
├─ Stuck                       calls that cannot be ended: end the process
└─ PublishError                discard the Kafka producer, restore, go on
   └─ Fenced                   another instance took over: stop
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "BourseError",
    "ConfigurationError",
    "ExchangeError",
    "ExchangeNonsense",
    "ExchangeRefused",
    "ExchangeUnavailable",
    "Fenced",
    "PublishError",
    "SchemaIncompatible",
    "Stuck",
    "Undecodable",
    "UnknownSchema",
    "Unreachable",
    "counted",
    "did_you_mean",
]


class BourseError(Exception):
    """The root: `except BourseError` catches whatever this product raises on purpose."""


class ConfigurationError(BourseError):
    """The operator must change something; the text names it. The command line exits with 2."""


class Unreachable(ConfigurationError):
    """A broker or registry does not answer: a service waits and reports it, a command exits with 2."""


class ExchangeError(BourseError):
    """A call to the exchange gave no snapshot.

    `kind` is one of token, scope, address, quota, rate, budget, provider, nonsense, timeout, network, internal; `code`
    and the text are the exchange's own if it gave any; `retry_after` is in seconds, `track_id` the last attempt's.
    `held` is true if no call was made, because of an earlier answer or of the budget.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        code: str | None = None,
        retry_after: float | None = None,
        track_id: str | None = None,
        held: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code
        self.retry_after = retry_after
        self.track_id = track_id
        self.held = held


class ExchangeUnavailable(ExchangeError):
    """The exchange or the way to it is down: keep polling, back off."""


class ExchangeRefused(ExchangeError):
    """The exchange answered and refused: token, scope, address or quota."""


class ExchangeNonsense(ExchangeError):
    """The exchange answered with something that is not a snapshot: count it, skip this poll."""


class SchemaIncompatible(BourseError):
    """A schema breaks the contract with what is released or registered: refuse to start."""


class Undecodable(BourseError):
    """A record's bytes are not what the topic promises: it becomes a dead letter."""


class UnknownSchema(Undecodable):
    """The registry does not know the schema that wrote a record; the record itself may be all right."""


class Stuck(BourseError):
    """Calls do not end, long after their deadline: the process must end, so that another one can start."""


class PublishError(BourseError):
    """A transaction failed: discard the Kafka producer, restore the state, go on."""


class Fenced(PublishError):
    """Another instance with the same transactional id took over."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 event, 2,000 events."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def printable(text: str) -> str:
    """Return a text without what a terminal would obey: control characters become spaces."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean x?` for the known name most like this one, or nothing; append it to a message."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), 1, cutoff)
    return f"; did you mean {near[0]}?" if near else ""
