"""Whole polls: complete, in order, each once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from bourse_cli.health import Monitor
from bourse_consumers.api import Day, Emit, MarketConsumer, Offsets, Partition, Record, Retry, WholePoll
from bourse_consumers.market import CHECK_SECONDS, Polls
from bourse_consumers.runner import Runner
from bourse_consumers.testing import DECODERS, Memory, MemoryMarket, marker, run, trade
from bourse_schemas.events import DeadLetter, Event, TradeEvent
from bourse_schemas.topics import TRADES, Topic

POLLS_0, TRADES_0 = Partition("bourse.polls", 0), Partition("bourse.trades", 0)


class Seen(MarketConsumer):
    """Notes what it gets, and publishes one event for each poll."""

    emits: Sequence[Topic] = (TRADES,)

    def __init__(self) -> None:
        self.days: list[Day] = []
        self.polls: list[tuple[int, int, bool, bool]] = []

    def open(self, day: Day) -> None:
        self.days.append(day)

    def process_poll(self, poll: WholePoll) -> list[Emit]:
        assert poll.frame().height == len(poll.events)
        self.polls.append((poll.marker.poll_sequence, len(poll.events), poll.replay, poll.complete))
        return [Emit(TRADES, trade(source="seen", sequence=poll.marker.poll_sequence))]


def polls(count: int, first: int = 1) -> list[Event]:
    """Return polls of two instruments each: their events, then the marker."""
    found: list[Event] = []
    for sequence in range(first, first + count):
        events = [trade(sequence=sequence, instrument=f"IRO1TEST000{number}") for number in range(2)]
        found += [*events, marker(*events)]
    return found


def published(memory: Memory) -> list[int]:
    return [emit.event.sequence for emit in memory.emitted if isinstance(emit.event, TradeEvent)]


def test_a_successor_rebuilds_the_day_and_goes_on() -> None:
    """Polls that are committed come again with `replay`; what is returned for them is dropped."""
    memory = Memory()
    memory.append(*polls(3))
    run(Seen(), memory)
    memory.append(*polls(2, first=4))
    second = Seen()
    run(second, memory)
    assert second.polls == [(number, 2, number <= 3, True) for number in range(1, 6)]
    assert published(memory) == [1, 2, 3, 4, 5]
    assert len(list(second.days[-1].read(TRADES))) == 15


def test_a_group_without_committed_polls_only_rebuilds() -> None:
    """Nobody wants the alerts of what is over; the next poll is new."""
    memory, consumer = Memory(), Seen()
    memory.append(*polls(2))
    running = Runner(consumer, MemoryMarket(memory), name="test")
    while running.step():
        pass
    memory.append(*polls(1, first=3))
    while running.step():
        pass
    assert [(sequence, replay) for sequence, _, replay, _ in consumer.polls] == [(1, True), (2, True), (3, False)]
    assert published(memory) == [3]


def test_a_poll_is_processed_once_however_often_its_batch_is_retried() -> None:
    """The polls of a batch before the one that fails are not processed again."""

    class Flaky(Seen):
        failures = 2

        def process_poll(self, poll: WholePoll) -> list[Emit]:
            if poll.marker.poll_sequence == 3 and self.failures:
                self.failures -= 1
                raise Retry("not yet", after=0)
            return super().process_poll(poll)

    memory, consumer = Memory(), Flaky()
    memory.append(*polls(4))
    run(consumer, memory)
    assert [sequence for sequence, *_ in consumer.polls] == [1, 2, 3, 4]
    assert published(memory) == [1, 2, 3, 4]


def test_a_poll_without_all_its_events_is_not_complete() -> None:
    """Its events are delivered all the same, and the next polls are complete."""
    memory, consumer = Memory(), Seen()
    events = polls(4)
    memory.append(*events[:3], *events[4:6], *events[7:])
    run(consumer, memory)
    assert consumer.polls == [(1, 2, False, True), (2, 1, False, False), (3, 1, False, False), (4, 2, False, True)]
    assert isinstance(consumer.monitor, Monitor)
    figure = consumer.monitor.registry.get_sample_value("bourse_consumer_incomplete_polls_total", {"consumer": "test"})
    assert figure == 2


def test_an_undecodable_event_becomes_one_dead_letter() -> None:
    """Its poll lacks it; a successor that rebuilds the day does not publish it again."""
    memory = Memory()
    memory.append(*polls(1))
    memory.append_bytes(TradeEvent, b"not ours")
    memory.append(*polls(1, first=2))
    run(Seen(), memory)
    letters = [emit.event for emit in memory.emitted if isinstance(emit.event, DeadLetter)]
    assert [letter.payload for letter in letters] == [b"not ours"]


def records(memory: Memory, topic: str) -> list[Record]:
    return [record for (name, _), log in memory.records.items() if name == topic for record in log if record]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_order_of_partitions_polls_come_whole_and_in_order(seed: int) -> None:
    """Markers are read far ahead of events, and one partition far ahead of another."""
    memory, chance = Memory(partitions=3), random.Random(seed)
    for sequence in range(1, 41):
        events = [trade(sequence=sequence, instrument=f"IRO1TEST000{number}") for number in range(3)]
        for number, event in enumerate(events):
            memory.append(event, partition=number)
        memory.append(marker(*events))
    collected = Polls(DECODERS, POLLS_0)
    queues = [
        records(memory, "bourse.polls"),
        *[[record for record in records(memory, "bourse.trades") if record.partition.number == n] for n in range(3)],
    ]
    found = []
    while any(queues) or len(collected):
        queue = chance.choice([queue for queue in queues if queue] or [[]])
        came = [queue.pop(0) for _ in range(min(len(queue), chance.randint(1, 15)))]
        collected.add(came)
        for record in collected.ready(chance.randint(1, 10)):
            poll = collected.event(record)
            found.append((poll.marker.poll_sequence, sorted(event.instrument for event in poll.events)))
    assert found == [(number, [f"IRO1TEST000{each}" for each in range(3)]) for number in range(1, 41)]
    assert not collected._pieces
    assert not collected._ready


def test_when_a_poll_has_to_be_checked() -> None:
    """After five seconds, once for all polls whose markers were read before; never because a later marker came."""
    memory = Memory()
    memory.append(*[each for each in polls(3) if not isinstance(each, TradeEvent)])
    collected, position, asked = Polls(DECODERS, POLLS_0), {TRADES_0: 0}, list[float]()

    def lost(now: float, end: int | None = 7) -> list[int]:
        def ends() -> Offsets | None:
            asked.append(now)
            return None if end is None else {TRADES_0: end}

        return [collected.event(each).marker.poll_sequence for each in collected.lost(now, position, ends)]

    collected.add(records(memory, "bourse.polls"))
    assert collected.ready(10) == []
    assert [lost(100.0), lost(100.0 + CHECK_SECONDS - 0.1)] == [[], []]
    assert asked == []
    assert lost(110.0, None) == []  # a broker does not answer
    assert [lost(111.0), lost(112.0)] == [[], []]  # not everything was read
    position[TRADES_0] = 7
    assert [lost(113.0), lost(113.0), lost(113.0), lost(999.0)] == [[1], [2], [3], []]
    assert asked == [110.0, 111.0]
