"""Which instance of a service leads: the owner of the polls topic's only partition, by Kafka's own group protocol.

Fencing alone keeps two live instances from publishing the same, but lets them take over from each other for ever.
Owning is not enough either: a leader that gives no sign of work, because it hangs, leaves the group.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from confluent_kafka import OFFSET_END, KafkaError, KafkaException

from bourse_schemas.kafka import Cluster, Contact
from bourse_schemas.topics import POLLS
from bourse_schemas.watchdog import deadline

if TYPE_CHECKING:
    from confluent_kafka import Consumer, TopicPartition

# The least a broker allows (group.min.session.timeout.ms): a dead leader is noticed after this time.
SESSION_MS, HEARTBEAT_MS = 6_000, 1_500
POLL_SECONDS = 0.1
CLOSE_SECONDS, STUCK_SECONDS = 2.0, 60.0
RETRY_SECONDS = 1.0


class Election:
    """A member of a group of its own; each time it is elected a new term begins.

    A leader may owe work for `owed_seconds`; then it leaves the group, until the service asks for its term again.
    """

    def __init__(
        self, cluster: Cluster, group: str, owed_seconds: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster, self._group = cluster, group
        self._owed_seconds, self._monotonic = owed_seconds, monotonic
        self._changed = threading.Condition()
        self._term: int | None = None
        self._terms = 0
        self._owed_until: float | None = None
        self._leave = self._stop = self._asked = False
        self._refusal: Exception | None = None
        self._log = structlog.get_logger(group=group)
        self._thread: threading.Thread | None = None

    def term(self, wait_seconds: float = 0.0) -> int | None:
        """Return the term in which this instance leads, None if it does not after this wait.

        The first call joins the group. Raises what ended the membership, ConfigurationError if the brokers do not let
        us into the group; the next call joins again.
        """
        with self._changed:
            self._asked = True
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="election", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._term is not None or self._refusal or self._stop, wait_seconds)
            if self._refusal is not None:
                refusal, self._refusal, self._thread = self._refusal, None, None
                raise refusal
            return self._term

    @property
    def leads(self) -> bool:
        """Return whether this instance leads; may be asked from any thread."""
        return self._term is not None

    def owe(self, in_seconds: float | None) -> None:
        """Set when the next work is due; None while none is."""
        with self._changed:
            self._owed_until = None if in_seconds is None else self._monotonic() + in_seconds + self._owed_seconds

    def overdue(self) -> bool:
        """Return whether work has been owed for too long; may be asked from any thread."""
        owed_until = self._owed_until  # which the service's thread may set meanwhile
        return owed_until is not None and self._monotonic() > owed_until

    def resign(self) -> None:
        """Leave the group and join it again: a fenced leader must not own the partition without publishing."""
        with self._changed:
            self._term, self._leave = None, True

    def close(self) -> None:
        """Leave the group, so that a successor starts at once."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    # --- the member's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop:
            try:
                self._be_member()
                with self._changed:
                    # A service that hangs must not be elected again.
                    self._changed.wait_for(lambda: self._asked or self._stop)
            except KafkaException as error:
                self._log.warning("joining the group again", error=error.args[0].str())
                with self._changed:
                    self._changed.wait_for(lambda: self._stop, RETRY_SECONDS)
            except Exception as error:  # raised by `term`: the service must not wait for a term that never comes
                with self._changed:
                    self._refusal = error
                    self._changed.notify_all()
                return

    def _be_member(self) -> None:
        consumer = self._cluster.consumer(
            self._group,
            session_timeout_ms=SESSION_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            # The classic protocol, whose sessions may be this short, and an assignor that leaves the leader in office.
            group_protocol="classic",
            partition_assignment_strategy="cooperative-sticky",
        )
        self._leave = False
        try:
            name = POLLS.full_name(self._cluster.prefix)
            consumer.subscribe([name], on_assign=self._elected, on_revoke=self._replaced, on_lost=self._lost)
            contact = Contact()
            while not (self._stop or self._leave):
                if self._term is not None and self.overdue():
                    self._log.error("leadership given up", reason="no work was done in time")
                    self._asked = False
                    break
                contact.require(consumer, name)
                message = consumer.poll(POLL_SECONDS)
                error = message.error() if message is not None else None
                if error is None:
                    continue
                if refusal := self._cluster.refusal(error, topic=name, group=self._group):
                    raise refusal
                if error.code() == KafkaError._FATAL:  # noqa: SLF001  # its name; `fatal()` is false for it
                    raise KafkaException(error)
        finally:
            self._set(None)
            # A member that never leaves would look like a standby for ever.
            with deadline("closing the election's consumer", STUCK_SECONDS):
                consumer.close()

    def _elected(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            partition.offset = OFFSET_END
        consumer.incremental_assign(partitions)
        # Only owning counts: nothing is read.
        consumer.pause(partitions)
        if any(partition.partition == 0 for partition in partitions) and not self._leave:
            self._terms += 1
            self.owe(0.0)
            self._set(self._terms)

    def _replaced(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_unassign(partitions)
        if any(partition.partition == 0 for partition in partitions):
            self._set(None)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._log.warning("leadership lost", reason="Kafka removed this instance from the group")
        self._replaced(consumer, partitions)

    def _set(self, term: int | None) -> None:
        with self._changed:
            self._term = term
            self._changed.notify_all()
