"""Publication: one Kafka transaction a poll, and the state read back from what was committed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from confluent_kafka import KafkaError, KafkaException, Producer

from bourse_producer.diff import Changes, InstrumentCode
from bourse_schemas.codec import Record, candle_and_event_records
from bourse_schemas.errors import ConfigurationError, Fenced, PublishError, Undecodable
from bourse_schemas.events import Candle, DeadLetter, Event, PollMarker
from bourse_schemas.kafka import Cluster, abandon, producer_id
from bourse_schemas.reading import read
from bourse_schemas.topics import CANDLES, DEAD_LETTERS, POLLS, TRADES, Topic

__all__ = ["Publisher", "State"]

E = TypeVar("E", bound=Event)

RESTORE_SECONDS = 60.0
POLL_SECONDS = 1.0
# Of the polls topic, in offsets, and of one source, in markers: more than a day has at the fastest sensible beat.
TAIL, MOST_MARKERS = 10_000, 2_000
# Nearer to now than this, no sensible topic refuses a record or deletes it at once.
OLD, AHEAD = timedelta(days=1), timedelta(minutes=30)
FOREVER = timedelta(days=365 * 1000)
ADMIN_SECONDS = 2.0
# The brokers give a transaction up after 20 s; without an end of its own the client may go on asking for minutes after
# they are back. Whether it was committed is not guessed: the next producer settles it, and it is read back.
COMMIT_SECONDS = 25.0


@dataclass(frozen=True, slots=True)
class State:
    """What is committed: each instrument's candle; of one source the last poll's sequence and the latest markers."""

    candles: dict[InstrumentCode, Candle]
    poll_sequence: int
    markers: Sequence[PollMarker] = ()


class Publisher:
    """Publishes polls for one source, all or nothing.

    After any PublishError the instance is void: close it, make a new one, `restore()`, poll again. There is no other
    recovery, and no guess whether a commit went through: what is committed is read back.
    """

    def __init__(self, cluster: Cluster, source: str) -> None:
        self._cluster = cluster
        self._source = source
        self._room: tuple[timedelta, timedelta] | None = None
        registry = cluster.registry()
        self._trades = registry.serializer(TRADES, cluster.prefix)
        self._candles = registry.serializer(CANDLES, cluster.prefix)
        self._polls = registry.serializer(POLLS, cluster.prefix)
        self._letters = registry.serializer(DEAD_LETTERS, cluster.prefix)
        writes = [topic.full_name(cluster.prefix) for topic in (TRADES, CANDLES, POLLS, DEAD_LETTERS)]
        cluster.require_topics([topic.full_name(cluster.prefix) for topic in (CANDLES, POLLS)], writes)
        cluster.require_sizes(writes)
        self._transactional_id = producer_id(cluster.prefix)
        self._producer: Producer = cluster.transactional_producer(self._transactional_id)

    def restore(self) -> State:
        """Fence any older instance, then return what is committed.

        The order matters: initialising settles the older instance's transaction, so that nothing can be committed after
        it was read. Raises PublishError.
        """
        self._initialise()
        candles = self._newest_candles()
        # Behind ten thousand of another source's there may be ours all the same.
        markers = self._markers(TAIL) or self._markers(None)
        # Markers are kept for a month, candles for ever: after a longer pause the sequence goes on from these.
        seen = [candle.poll_sequence for candle in candles.values() if candle.source == self._source]
        seen += [marker.poll_sequence for marker in markers]
        return State(candles, max(seen, default=0), markers)

    def _newest_candles(self) -> dict[InstrumentCode, Candle]:
        # Whichever source saw it: where one follows another, the instrument's sequence goes on.
        candles: dict[InstrumentCode, Candle] = {}
        for candle in self._committed(CANDLES, Candle):
            known = candles.get(candle.instrument)
            # In a topic that has grown an instrument's candles lie in two partitions, which are read in any order.
            if known is None or (known.trading_day, known.sequence) <= (candle.trading_day, candle.sequence):
                candles[candle.instrument] = candle
        return candles

    def _markers(self, tail: int | None) -> Sequence[PollMarker]:
        found = self._committed(POLLS, PollMarker, tail)
        return deque((marker for marker in found if marker.source == self._source), MOST_MARKERS)

    def _initialise(self) -> None:
        """Initialise in short steps: a signal's handler cannot run while librdkafka waits."""
        deadline = time.monotonic() + RESTORE_SECONDS
        while True:
            try:
                return self._producer.init_transactions(POLL_SECONDS)
            except KafkaException as error:
                if refusal := self._cluster.refusal(error.args[0], transactional_id=self._transactional_id):
                    raise refusal from error
                if not error.args[0].retriable() or time.monotonic() > deadline:
                    raise self._error(error.args[0]) from error

    def publish(self, changes: Changes, letters: Iterable[DeadLetter], markers: Iterable[PollMarker]) -> None:
        """Publish one poll: events, candles, dead letters and markers in one transaction, or nothing of it.

        Raises PublishError; Fenced where another instance took over.
        """
        self._producer.poll(0)  # what it has to say piles up otherwise
        self._do(self._producer.begin_transaction)
        for candle, event in zip(changes.candles, changes.events, strict=True):
            state, change = candle_and_event_records(self._candles, self._trades, candle, event)
            self._produce(change)
            self._produce(state)
        for letter in letters:
            self._produce(self._letters(letter))
        for marker in markers:
            self._produce(self._polls(marker))
        self._do(lambda: self._producer.commit_transaction(COMMIT_SECONDS))

    def require_room_for(self, instant: datetime) -> None:
        """Raise ConfigurationError where records of this time would be deleted at once or refused by the brokers."""
        now = datetime.now(UTC)
        if now - OLD < instant < now + AHEAD:
            return
        if self._room is None:
            self._room = _room(self._cluster)
        retention, ahead = self._room
        if instant < now - retention or instant > now + ahead:
            name = TRADES.full_name(self._cluster.prefix)
            why = (
                f"{name} keeps {retention.days} days" if instant < now else f"{name} takes nothing so far in the future"
            )
            raise ConfigurationError(
                f"records of {instant:%Y-%m-%d} would not stay: {why}; for a day of another time run "
                "`bourse topics apply --any-time`"
            )

    def close(self) -> None:
        """Give the producer up; a transaction under way is aborted, here or by the next `restore()`."""
        abandon(self._producer)

    def _produce(self, record: Record) -> None:
        while True:
            try:
                return self._producer.produce(
                    record.topic, record.value, record.key, timestamp=record.timestamp, headers=record.headers
                )
            except BufferError:
                # The queue is full; what brokers do not take is thrown out of it in time, and the commit fails.
                self._producer.poll(POLL_SECONDS)
            except KafkaException as error:
                if error.args[0].code() in {KafkaError._FATAL, KafkaError._STATE}:  # noqa: SLF001
                    # Only the commit reports why: fenced, or a record was refused while others were being produced.
                    self._do(lambda: self._producer.commit_transaction(COMMIT_SECONDS))
                raise self._error(error.args[0]) from error

    def _do(self, step: Callable[[], object]) -> None:
        try:
            step()
        except KafkaException as error:
            raise self._error(error.args[0]) from error

    def _error(self, error: KafkaError) -> PublishError:
        if error.code() in {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}:  # noqa: SLF001
            return Fenced("another instance with the same source took over")
        refusal = self._cluster.refusal(error, "WRITE", transactional_id=self._transactional_id)
        return PublishError(str(refusal or error.str()))

    def _committed(self, topic: Topic, event: type[E], tail: int | None = None) -> Iterable[E]:
        """Yield the committed events of a topic, in order per partition; of the last `tail` offsets, if given."""
        name = topic.full_name(self._cluster.prefix)
        decode = self._cluster.registry().deserializer(event)
        try:
            # Open transactions are waited for: they hide what was committed after they began.
            records = read(self._cluster, name, tail=tail, pending=True, timeout=RESTORE_SECONDS)
            if topic.cleanup == "compact":
                # Only the last value of a key counts; how much of the others is still there is chance.
                records = iter({(record.place, record.key): record for record in records}.values())
            for record in records:
                # A tombstone is how an operator takes a delisted instrument out: unknown again, when it comes back.
                if record.value is not None:
                    yield decode(record.value)
        except Undecodable as error:
            raise ConfigurationError(f"{name} holds something that is not ours: {error}") from error
        except ConfigurationError as error:
            # Nothing read is not the same as nothing there: the whole market would be published again.
            raise PublishError(f"the state cannot be read: {error}") from error


def _room(cluster: Cluster) -> tuple[timedelta, timedelta]:
    """Return how far into the past and the future a record's time may lie, by the topic's settings."""
    from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # not in its __all__

    admin = cluster.admin()
    resource = ConfigResource(ResourceType.TOPIC, TRADES.full_name(cluster.prefix))
    try:
        settings = admin.describe_configs([resource], request_timeout=ADMIN_SECONDS)[resource].result()
    except KafkaException:
        # Where settings may not be read, or nobody can tell them (the mock cluster), nothing is known against it.
        return FOREVER, FOREVER
    past, future = (
        int(settings[key].value) if key in settings else -1
        for key in ("retention.ms", "message.timestamp.after.max.ms")
    )
    return _span(past), _span(future)


def _span(millis: int) -> timedelta:
    return FOREVER if millis < 0 else min(FOREVER, timedelta(milliseconds=min(millis, 10**14)))
