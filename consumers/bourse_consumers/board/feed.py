"""Reads the topics into a `State` on two threads, whatever becomes of brokers and topics meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

from bourse_consumers.board.state import Group, Located, State
from bourse_schemas.errors import ConfigurationError, Undecodable, Unreachable
from bourse_schemas.events import TradeEvent
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import LAST, GroupLag, Partition, TopicRecord, day_start, follow, group_lag, offsets
from bourse_schemas.topics import CANDLES, TOPICS

PROBE_SECONDS, RETRY_SECONDS = 3.0, 1.0
CATCH_UP_SECONDS = 10.0


class Feed:
    """A state that follows the topics: `with feed.lock:` for every access to `feed.state`.

    When topics were created again or their ends went back, `state` is another one, which begins with nothing.
    """

    def __init__(self, cluster: Cluster, groups: Sequence[str] = ()) -> None:
        """Also ask for the lag of all groups that begin with the prefix, and of `groups`."""
        self.state, self.lock = State(), threading.Lock()
        self.failed: BaseException | None = None
        self._begun = False
        self._cluster, self._groups = cluster, groups
        self._topics = {topic.full_name(cluster.prefix): topic for topic in TOPICS}
        self._registry = cluster.registry()
        self._decode = {name: self._registry.deserializer(topic.event) for name, topic in self._topics.items()}
        self._stop, self._again = threading.Event(), threading.Event()
        self._known: tuple[dict[str, str], dict[Partition, int]] = {}, {}

    def require(self) -> None:
        """Raise ConfigurationError if brokers or registry do not answer, or topics are missing."""
        self._cluster.require_topics(list(self._topics))
        with suppress(Undecodable):
            self._registry.schema(0)  # no schema has this id, but the answer shows that the registry is reachable

    def __enter__(self) -> Self:
        for job, subject, pause in ((self._read, "reading", RETRY_SECONDS), (self._probe, "kafka", PROBE_SECONDS)):
            threading.Thread(target=self._repeat, args=(job, subject, pause), name=subject, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # a thread that waits for a lost broker is left to the end of the process

    def settled(self, now: float) -> State:
        """Return the state with what is due by now; to be called with the lock, several times a second."""
        if self.failed:
            raise self.failed
        self.state.settle(now)
        return self.state

    def trouble(self) -> str | None:
        """Return why the state is not what is on the topics; no broker's address is in it."""
        with self.lock:
            failed = ", ".join(subject for subject in self.state.troubles if subject != "groups")
            return f"{failed} failed" if failed else ("being read" if self.state.live_since is None else None)

    def _repeat(self, job: Callable[[], None], subject: str, pause: float) -> None:
        try:
            while not self._stop.is_set():
                trouble = None
                try:
                    job()
                except ConfigurationError as error:
                    if not self._begun and job == self._read and not isinstance(error, Unreachable):
                        raise  # a mistake of the operator's
                    trouble = str(error)
                self._trouble(subject, trouble)
                self._stop.wait(pause)
        except BaseException as error:  # the reader of the state raises it again
            self.failed = error

    def _trouble(self, subject: str, text: str | None) -> None:
        with self.lock:
            self.state.trouble(subject, text)

    def _read(self) -> None:
        self._again.clear()
        counts = self._cluster.require_topics(list(self._topics))
        self._begun = True
        places = [(name, number) for name, count in counts.items() for number in range(count)]
        dated = dict.fromkeys(place for place in places if self._topics[place[0]] is not CANDLES)
        starts = {**dict.fromkeys(places, 0), **day_start(self._cluster, dated)}
        with self.lock:
            state = self.state = self.state if self.state.marker is None else State()
        began = time.monotonic()
        # A partition whose broker is unreachable does not hold up the others.
        for batch in follow(self._cluster, dict.fromkeys(self._topics), starts=starts, timeout=math.inf):
            if self._stop.is_set() or self._again.is_set():
                return
            live = state.live_since is not None
            # A live candle repeats what its event contains.
            events = [self._event(each) for each in batch.records if not live or self._is_news(each)]
            now = time.monotonic()
            with self.lock:
                for event in events:
                    state.add(event, now)
                state.settle(now)
                state.trouble("reading", batch.trouble if batch.behind else None)
                if not batch.behind or now - began > CATCH_UP_SECONDS:
                    state.go_live(now)

    def _is_news(self, record: TopicRecord) -> bool:
        return self._topics[record.place[0]] is not CANDLES or record.value is None

    def _event(self, record: TopicRecord) -> Any:
        """Return the record's event, None if it cannot be decoded; wait while the registry does not answer."""
        topic, failed = self._topics[record.place[0]], False
        if topic is CANDLES and record.value is None:
            return (record.key or b"").decode(errors="replace")
        while not self._stop.is_set():
            try:
                event = self._decode[record.place[0]](record.value)
            except Undecodable:
                return None
            except Unreachable as error:
                failed = True
                self._trouble("registry", str(error))
                self._stop.wait(RETRY_SECONDS)
                continue
            if failed:
                self._trouble("registry", None)
            return Located(event, *record.place[1:], record.offset) if isinstance(event, TradeEvent) else event
        return None

    def _probe(self) -> None:
        """Ask what the topics are and for the groups' lag; the answers also show that brokers are reachable."""
        topics = self._cluster.topics(self._topics)
        places = [(name, number) for name, topic in topics.items() for number in range(topic.partitions)]
        ends = offsets(self._cluster, dict.fromkeys(places, LAST), timeout=PROBE_SECONDS)
        ids = {name: topic.topic_id for name, topic in topics.items()}
        old_ids, old_ends = self._known
        if any(ids.get(name) != it for name, it in old_ids.items()) or any(
            ends.get(place, 0) < end for place, end in old_ends.items()
        ):
            self._again.set()
        self._known = ids, ends
        found, trouble = list[GroupLag](), None
        try:
            found = group_lag(self._cluster, timeout=PROBE_SECONDS)
            if self._groups:
                found += group_lag(self._cluster, self._groups, timeout=PROBE_SECONDS)
        except ConfigurationError as error:
            trouble = str(error)
        with self.lock:
            self.state.groups = groups_of(found, f"{self._cluster.prefix}-") if found or trouble is None else None
            self.state.trouble("groups", trouble)


def groups_of(found: Sequence[GroupLag], prefix: str) -> list[Group]:
    """Return the groups that have offsets; a market consumer has its members in a group of their own."""
    alive = {each.group.removesuffix("-election") for each in found if each.members}
    return [
        Group(each.group.removeprefix(prefix), each.group in alive, each.lag) for each in found if each.lag is not None
    ]
