"""Which instance of a source polls: the one that owns the polls topic's only partition, by Kafka's own group protocol.

Fencing alone keeps two live instances from publishing the same poll, but lets them take over from each other for ever.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from confluent_kafka import OFFSET_END, KafkaException

from bourse_cli.logs import get_logger
from bourse_schemas.kafka import Cluster, producer_id
from bourse_schemas.topics import POLLS

if TYPE_CHECKING:
    from confluent_kafka import Consumer, TopicPartition

__all__ = ["Election"]

# The least a broker allows (group.min.session.timeout.ms): a dead leader is missed after so long.
SESSION_MS, HEARTBEAT_MS = 6_000, 1_500
POLL_SECONDS = 0.1
CLOSE_SECONDS = 2.0
RETRY_SECONDS = 1.0


class Election:
    """A member of the source's group; each time it is elected a new term begins."""

    def __init__(self, cluster: Cluster, source: str) -> None:
        self._cluster = cluster
        self._group = producer_id(cluster.prefix)
        self._changed = threading.Condition()
        self._term: int | None = None
        self._terms = 0
        self._resigned = self._stop = False
        self._refusal: Exception | None = None
        self._log = get_logger(source=source)
        self._thread = threading.Thread(target=self._run, name="election", daemon=True)

    def term(self, wait_seconds: float = 0.0) -> int | None:
        """Return the term in which this instance leads, None where it does not after so long a wait.

        The first call joins the group. Raises ConfigurationError where the brokers do not let us into it, and whatever
        else ended the membership.
        """
        with self._changed:
            if not self._thread.ident:
                self._thread.start()
            self._changed.wait_for(lambda: self._term is not None or self._refusal or self._stop, wait_seconds)
            if self._refusal is not None:
                raise self._refusal
            return self._term

    def resign(self) -> None:
        """Leave the group and join it anew: who was fenced must not go on owning the partition without publishing."""
        with self._changed:
            self._term, self._resigned = None, True

    def close(self) -> None:
        """Leave the group, so that a successor starts at once."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS)

    # --- the member's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop:
            try:
                self._be_member()
            except KafkaException as error:
                self._log.warning("leaving the group of this source and joining anew", error=error.args[0].str())
                time.sleep(RETRY_SECONDS)
            except Exception as error:  # raised where the producer runs: nobody may wait for a lead that never comes
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
        self._resigned = False
        try:
            name = POLLS.full_name(self._cluster.prefix)
            consumer.subscribe([name], on_assign=self._elected, on_revoke=self._replaced, on_lost=self._lost)
            while not (self._stop or self._resigned):
                message = consumer.poll(POLL_SECONDS)
                error = message.error() if message is not None else None
                if error is None:
                    continue
                if refusal := self._cluster.refusal(error, topic=name, group=self._group):
                    raise refusal
                if error.fatal():
                    raise KafkaException(error)
        finally:
            self._set(None)
            consumer.close()

    def _elected(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            partition.offset = OFFSET_END
        consumer.incremental_assign(partitions)
        # Owning is all that counts: nothing is read.
        consumer.pause(partitions)
        if any(partition.partition == 0 for partition in partitions) and not self._resigned:
            self._terms += 1
            self._set(self._terms)

    def _replaced(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_unassign(partitions)
        if any(partition.partition == 0 for partition in partitions):
            self._set(None)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._log.warning(
            "fenced: the group gave the lead away while this instance did not answer, or could not reach Kafka"
        )
        self._replaced(consumer, partitions)

    def _set(self, term: int | None) -> None:
        with self._changed:
            self._term = term
            self._changed.notify_all()
