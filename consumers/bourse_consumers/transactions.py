"""Publish emits together with offsets, one Kafka transaction each.

librdkafka 2.16 never returns from `send_offsets_to_transaction` after a broker restarted, whatever its time-out. So the
producer is thrown away after any error of a transaction, any loss of a broker and every rebalance, and a call that
hangs ends the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from bourse_consumers.api import Emit
from bourse_consumers.runner import StreamBroken
from bourse_schemas.codec import Record
from bourse_schemas.errors import BourseError
from bourse_schemas.kafka import Cluster, abandon
from bourse_schemas.topics import Topic
from bourse_schemas.watchdog import deadline

TRANSACTION_MS = 10_000
# The brokers abort a transaction after TRANSACTION_MS. Whether it was committed is not guessed: the next producer
# settles it, and it is read back.
COMMIT_SECONDS = 12.0
# Short enough to stop within five seconds; what takes longer is asked for again.
ASK_SECONDS = 3.0
# A call that takes so long hangs, and ends the process.
HANG_SECONDS = 30.0


class Transactions:
    """Makes transactions under one transactional id, with a new producer whenever the last one may be damaged."""

    def __init__(self, cluster: Cluster, transactional_id: str, topics: Sequence[Topic]) -> None:
        registry = cluster.registry()
        self._cluster, self._id = cluster, transactional_id
        self._serializers: dict[Topic, Any] = {topic: registry.serializer(topic, cluster.prefix) for topic in topics}
        self._producer: Producer | None = None
        self._suspect = False
        self._too_large: BourseError | None = None

    def suspect(self, *_: object) -> None:
        """Note that the producer may be damaged: a broker was lost, or the group was rebalanced."""
        self._suspect = True

    def poll(self) -> None:
        """Serve the producer's callbacks."""
        if self._producer is not None:
            self._producer.poll(0)

    def prepare(self) -> bool:
        """Have a producer that is not damaged; return whether it is new: then it settled what was left open."""
        self.poll()  # a broker may have been lost since the last call
        if self._suspect:
            self.close()
        if self._producer is not None:
            return False
        self._suspect = False
        producer = self._cluster.transactional_producer(self._id, TRANSACTION_MS, error_cb=self.suspect)
        try:
            with deadline("init_transactions", HANG_SECONDS):
                producer.init_transactions(ASK_SECONDS)
        except KafkaException as error:
            abandon(producer)
            raise self._broken(error.args[0]) from error
        self._producer = producer
        return True

    def commit(
        self,
        emits: Sequence[Emit],
        offsets: Sequence[TopicPartition],
        group: Any,
        renewed: Callable[[], None] = lambda: None,
    ) -> None:
        """Publish emits and commit offsets, all or nothing; `renewed` is called before if the producer is a new one.

        Raises StreamBroken; BourseError if an emit is too large.
        """
        records = [self._serializers[emit.topic](emit.event) for emit in emits]
        if self.prepare():
            renewed()
        assert self._producer is not None  # noqa: S101  # for the type checker: `prepare` made it
        self._too_large = None
        try:
            self._transact(self._producer, records, offsets, group)
        except KafkaException as error:
            self.close()
            raise self._too_large or self._broken(error.args[0]) from error

    def close(self) -> None:
        """Abandon the producer; its successor settles a transaction that is open."""
        if self._producer is not None:
            abandon(self._producer)
            self._producer = None

    def _transact(
        self, producer: Producer, records: Sequence[Record], offsets: Sequence[TopicPartition], group: Any
    ) -> None:
        producer.begin_transaction()
        for record in records:
            self._produce(producer, record)
        if offsets:
            with deadline("send_offsets_to_transaction", HANG_SECONDS):
                producer.send_offsets_to_transaction(list(offsets), group, COMMIT_SECONDS)
        with deadline("commit_transaction", HANG_SECONDS):
            producer.commit_transaction(COMMIT_SECONDS)

    def _produce(self, producer: Producer, record: Record) -> None:
        note = partial(self._delivered, record)
        about: dict[str, Any] = {"timestamp": record.timestamp, "headers": record.headers, "on_delivery": note}
        while True:
            try:
                return producer.produce(record.topic, record.value, record.key, **about)
            except BufferError:
                producer.poll(0.1)
            except KafkaException as error:
                note(error.args[0])
                raise

    def _delivered(self, record: Record, error: KafkaError | None, _: object = None) -> None:
        if error is not None and error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            key = (record.key or b"").decode(errors="replace")
            message = f"an event of {len(record.value)} bytes is larger than {record.topic} accepts"
            self._too_large = BourseError(f"{message} (key {key}): {error.str()}")

    def _broken(self, error: KafkaError) -> BourseError:
        return self._cluster.refusal(error, "WRITE", transactional_id=self._id) or StreamBroken(error.str())
