"""Publication: one Kafka transaction a poll, and the state read back from what was committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote_to_bytes

from confluent_kafka import KafkaError, KafkaException, Producer

from bourse_cli.logs import get_logger
from bourse_producer.diff import Changes, InstrumentCode
from bourse_schemas.codec import Record, candle_and_event_records
from bourse_schemas.errors import ConfigurationError, Fenced, PublishError, Undecodable, UnknownSchema
from bourse_schemas.events import TEHRAN, Candle, DeadLetter, PollMarker
from bourse_schemas.kafka import FENCED, Cluster, Contact, abandon, producer_id
from bourse_schemas.reading import TopicRecord, read
from bourse_schemas.topics import CANDLES, DAY_MS, DEAD_LETTERS, POLLS, TRADES, Topic
from bourse_schemas.watchdog import deadline

# A client that cannot initialise within this time is replaced: it may have lost its brokers for good, see `Contact`.
INITIALISE_SECONDS = 15.0
RESTORE_SECONDS = 60.0
POLL_SECONDS = 1.0
# Offsets of the polls topic, of which a marker's transaction takes two: days at a beat of a minute. If they do not hold
# the last marker's whole day, more is read.
TAILS = (2_000, 20_000, None)
# The brokers abort a transaction after 20 s; without a limit of its own the client may go on asking for minutes after
# they are back. Whether it was committed is not guessed: the next producer settles it, and it is read back. The process
# ends if the client ignores its limit.
COMMIT_SECONDS, STUCK_SECONDS = 25.0, 60.0


class NoRoom(ConfigurationError):
    """Records of this time would be refused, or deleted at once."""


@dataclass(frozen=True, slots=True)
class State:
    """What is committed: each instrument's candle, the last poll's sequence, and the latest markers.

    `foreign` is how many foreign records were skipped among the markers.
    """

    candles: dict[InstrumentCode, Candle]
    poll_sequence: int
    markers: Sequence[PollMarker] = ()
    foreign: int = 0


def committed_state(cluster: Cluster) -> State:
    """Return what is committed; nothing is written.

    Raises PublishError or ConfigurationError if it cannot be read whole: nothing read is not the same as nothing there,
    the whole market would be published again.
    """
    candles: dict[InstrumentCode, Candle] = {}
    for candle in _candles(cluster):
        known = candles.get(candle.instrument)
        # In a topic that has grown an instrument's candles are in two partitions, which are read in any order.
        if known is None or (known.trading_day, known.sequence) <= (candle.trading_day, candle.sequence):
            candles[candle.instrument] = candle
    markers, foreign = _markers(cluster)
    # Markers are kept for a month, candles for ever: after a longer pause the sequence goes on from these.
    polls = [candle.poll_sequence for candle in candles.values()] + [marker.poll_sequence for marker in markers]
    return State(candles, max(polls, default=0), markers, foreign)


def _candles(cluster: Cluster) -> Iterator[Candle]:
    decode = cluster.registry().deserializer(Candle)
    # Only the last value of a key counts: how many of the others are still there is chance.
    for record in {(each.place, each.key): each for each in _committed(cluster, CANDLES)}.values():
        # A tombstone is how an operator removes a delisted instrument: unknown again, if it comes back.
        if record.value is not None:
            try:
                yield decode(record.value)
            except UnknownSchema as error:
                raise _unreadable(record, f"unreadable ({error})") from error
            except Undecodable as error:
                at = f"--bootstrap-servers {cluster.bootstrap_servers} --topic-prefix {cluster.prefix}"
                remedy = f"remove it: bourse produce {at} --remove-candle {record.place[1]}/{quote(record.key or b'')}"
                raise _unreadable(record, f"not a candle ({error})", remedy) from error


def _unreadable(record: TopicRecord, fault: str, remedy: str = "restore the registry's schemas") -> ConfigurationError:
    place = f"{'-'.join(map(str, record.place))} at offset {record.offset}, key {record.key or b''!r}"
    return ConfigurationError(f"{place}: {fault}; the state cannot be read\n{remedy}")


def _markers(cluster: Cluster) -> tuple[list[PollMarker], int]:
    """Return the latest markers, and how many foreign records were skipped among them.

    They are those of the last one's whole day at least: the day's charged calls are counted.
    """
    for tail in TAILS:
        markers, foreign = _last_markers(cluster, tail)
        ends = (*markers[:1], *markers[-1:])
        days = {marker.requested_at.astimezone(TEHRAN).date() for marker in ends}
        # A session's final poll can be days ago, if closed days are polled too.
        sessions = {marker.session_day for marker in ends}
        if tail is None or len(days) == len(sessions) == 2 or len(markers) < tail // 3:
            break
    return markers, foreign


def _last_markers(cluster: Cluster, tail: int | None) -> tuple[list[PollMarker], int]:
    decode, markers, foreign = cluster.registry().deserializer(PollMarker), list[PollMarker](), 0
    for record in _committed(cluster, POLLS, tail):
        try:
            markers.append(decode(record.value))
        except UnknownSchema as error:
            raise _unreadable(record, f"unreadable ({error})") from error
        except Undecodable as error:
            foreign += 1
            place = "-".join(map(str, record.place))
            get_logger().warning("foreign record skipped", place=place, offset=record.offset, error=str(error))
    return markers, foreign


def _committed(cluster: Cluster, topic: Topic, tail: int | None = None) -> Iterator[TopicRecord]:
    """Yield a topic's committed records; what is behind another program's open transaction is waited for."""
    name = topic.full_name(cluster.prefix)
    try:
        yield from read(cluster, name, tail=tail, pending=True, timeout=RESTORE_SECONDS)
    except KafkaException as error:
        raise PublishError(f"{name} cannot be read: {error.args[0].str()}") from error


class Publisher:
    """Publishes the polls of a prefix, all or nothing.

    After any PublishError the instance is void: close it, make a new one, `restore()`, poll again. Nothing else
    recovers it, and whether a commit succeeded is not guessed: what is committed is read back.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        registry = cluster.registry()
        topics = TRADES, CANDLES, POLLS, DEAD_LETTERS
        serializers = (registry.serializer(topic, cluster.prefix) for topic in topics)
        self._trades, self._candles, self._polls, self._letters = serializers
        writes = [topic.full_name(cluster.prefix) for topic in topics]
        cluster.require_topics(writes[1:3], writes)
        self._settings = cluster.require_sizes(writes).get(writes[0], {})
        self._transactional_id = producer_id(cluster.prefix)
        self._producer: Producer = cluster.transactional_producer(self._transactional_id)
        self._contact = Contact()

    def restore(self) -> State:
        """Fence any older instance, then return what is committed.

        The order matters: initialising settles the older instance's transaction, so that nothing can be committed after
        it was read. Raises PublishError.
        """
        self._initialise()
        return committed_state(self._cluster)

    def _initialise(self) -> None:
        until = time.monotonic() + INITIALISE_SECONDS
        while True:
            try:
                with deadline("init_transactions", STUCK_SECONDS):
                    return self._producer.init_transactions(POLL_SECONDS)
            except KafkaException as error:
                if refusal := self._cluster.refusal(error.args[0], transactional_id=self._transactional_id):
                    raise refusal from error
                if not error.args[0].retriable() or time.monotonic() > until:
                    raise self._error(error.args[0]) from error

    def publish(self, changes: Changes, letters: Iterable[DeadLetter], markers: Iterable[PollMarker]) -> None:
        """Publish one poll: events, candles, dead letters and markers in one transaction, or nothing of it.

        Raises PublishError; Fenced if another instance took over.
        """
        self.idle()
        self._do(self._producer.begin_transaction)
        for candle, change in zip(changes.candles, changes.each, strict=True):
            state, event = candle_and_event_records(self._candles, self._trades, candle, change)
            self._produce(event)
            self._produce(state)
        for letter in letters:
            self._produce(self._letters(letter))
        for marker in markers:
            self._produce(self._polls(marker))
        self._do(lambda: self._producer.commit_transaction(COMMIT_SECONDS))

    def remove(self, place: str) -> None:
        """Remove a candle, or a foreign record among them, by a record without a value; `place` is PARTITION/KEY."""
        partition, _, key = place.partition("/")
        if not (partition.isdecimal() and key):
            raise ConfigurationError(f"--remove-candle {place}: not a partition and a key such as 0/IRO1MADN0001")
        self._initialise()
        self._do(self._producer.begin_transaction)
        name = CANDLES.full_name(self._cluster.prefix)
        self._do(lambda: self._producer.produce(name, None, unquote_to_bytes(key), int(partition)))
        self._do(lambda: self._producer.commit_transaction(COMMIT_SECONDS))

    def idle(self) -> None:
        """Serve the client's callbacks: statistics of a client that nobody polls pile up.

        Raises PublishError if the client has lost its brokers: a successor must not find that out first.
        """
        self._producer.poll(0)
        try:
            self._contact.require(self._producer, POLLS.full_name(self._cluster.prefix))
        except KafkaException as error:
            raise self._error(error.args[0]) from error

    def require_room_for(self, instant: datetime) -> None:
        """Raise NoRoom if records of this time would be deleted at once or refused by the brokers."""
        age = (datetime.now(UTC) - instant) / timedelta(milliseconds=1)
        limits = ("retention.ms", "message.timestamp.after.max.ms")
        retention, ahead = (int(self._settings.get(name, -1)) for name in limits)
        if 0 <= retention < age or 0 <= ahead < -age:
            name = TRADES.full_name(self._cluster.prefix)
            why = f"keeps {retention / DAY_MS:.0f} days" if age > 0 else "takes nothing so far in the future"
            raise NoRoom(
                f"records of {instant:%Y-%m-%d} would not stay: {name} {why}; for a day of another time run "
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
                # The queue is full; what brokers do not take is removed from it in time, and the commit fails.
                self._producer.poll(POLL_SECONDS)
            except KafkaException as error:
                if error.args[0].code() in {KafkaError._FATAL, KafkaError._STATE}:  # noqa: SLF001
                    # Only the commit reports why: fenced, or a record was refused while others were being produced.
                    self._do(lambda: self._producer.commit_transaction(COMMIT_SECONDS))
                raise self._error(error.args[0]) from error

    def _do(self, step: Callable[[], object]) -> None:
        try:
            with deadline("a transaction's step", STUCK_SECONDS):
                step()
        except KafkaException as error:
            raise self._error(error.args[0]) from error

    def _error(self, error: KafkaError) -> PublishError:
        if error.code() in FENCED:
            return Fenced("another instance of this prefix took over")
        refusal = self._cluster.refusal(error, "WRITE", transactional_id=self._transactional_id)
        return PublishError(str(refusal or error.str()))
