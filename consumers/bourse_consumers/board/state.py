"""The market, the feed and the alerts as a fold over the records of all topics: what `bourse watch` and `board` show.

Pure: durations are on the monotonic clock given as `now` (seconds), because the market's own clock may be a simulated
one, or one of years ago. Until `go_live` records are a backlog that comes partition by partition; from then on the
events of a poll are applied together, when as many have come as its marker counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

from bourse_schemas.errors import counted
from bourse_schemas.events import AlertState, Candle, DeadLetter, Op, Outcome, Phase, PollMarker, PriceAlert, TradeEvent

# A poll whose events do not come is applied without them after this time.
INCOMPLETE_SECONDS = 5.0
LATE_SECONDS = 120.0
OPS = (Op.OPENED, Op.TRADED, Op.REVISED, Op.CANCELLED)
# What is kept of each change of the day: these fields, then partition and offset.
CHANGE = (
    *("sequence", "op", "observed_at", "traded_at", "last_price", "closing_price", "last_price_delta"),
    *("closing_price_delta", "volume_delta", "value_delta", "trade_count_delta", "poll_sequence"),
)
Episode = tuple[PriceAlert, PriceAlert | None]
Gap = tuple[int, int | None, str]


class Located(NamedTuple):
    """An event and where it is on its topic."""

    event: TradeEvent
    partition: int
    offset: int


class Group(NamedTuple):
    """A consumer group, without the prefix: has it members, and how many offsets is it behind."""

    name: str
    alive: bool
    lag: int


def row(event: object, names: Sequence[str]) -> list[Any]:
    """Return fields of an event as JSON has them: instants in milliseconds since 1970."""
    values = (getattr(event, name) for name in names)
    return [_millis(value) if isinstance(value, datetime) else value for value in values]


def _millis(instant: datetime) -> int:
    return round(instant.timestamp() * 1000)


def _counts(marker: PollMarker) -> tuple[int, ...]:
    return marker.opened, marker.traded, marker.revised, marker.cancelled


def percent(candle: Candle) -> float | None:
    """Return the change of the last price since the previous close in percent; None if one of them is not known."""
    if candle.last_price is None or not candle.previous_close:
        return None
    return 100 * (candle.last_price - candle.previous_close) / candle.previous_close


def error_of(marker: PollMarker) -> str:
    """Return a poll's error in one text, empty if it had none."""
    return ": ".join(filter(None, (marker.error_kind, marker.error_code, marker.error_message)))


class State:
    """What the records so far add up to; `version` rises with each change of it."""

    def __init__(self) -> None:
        self.version = 0
        self.live_since: float | None = None
        self.marker: PollMarker | None = None
        self.marker_at = 0.0
        self.markers: deque[PollMarker] = deque(maxlen=20_000)  # the day's
        self.totals: Counter[Op] = Counter()
        self.candles: dict[str, Candle] = {}
        # By instrument and sequence: a second reading of a change replaces the first.
        self.changes: defaultdict[str, dict[int, tuple[Any, ...]]] = defaultdict(dict)
        self.episodes: dict[str, Episode] = {}
        self.dead_letters = self.undecodable = self.incomplete = 0
        self.last_letter: DeadLetter | None = None
        self.groups: Sequence[Group] | None = None
        self.troubles: dict[str, str] = {}
        self.news: deque[PollMarker | PriceAlert | str] = deque(maxlen=1000)
        self.dirty: set[str] = set()  # instruments that changed; the reader empties it
        self._day: date | None = None
        self._summed_up: date | None = None
        self._was_silent = False
        self._applied = 0
        self._waiting: deque[tuple[float, PollMarker]] = deque()
        self._pending: defaultdict[int, list[Located]] = defaultdict(list)
        self._read: Counter[int] = Counter()  # events by poll, of polls that are not applied yet

    @property
    def day(self) -> date | None:
        """Return the session's day: the newest marker's, or without markers the newest candle's."""
        return self._day or max((candle.trading_day for candle in self.candles.values()), default=None)

    def today(self) -> Iterator[Candle]:
        """Yield the day's candles."""
        day = self.day
        return (candle for candle in self.candles.values() if candle.trading_day == day)

    def add(self, event: object, now: float) -> None:
        """Fold one event in, whatever its topic; None is a record that cannot be decoded."""
        live = self.live_since is not None
        self.version += 1
        match event:
            case Located(event=trade):
                if is_early := trade.poll_sequence > self._applied:
                    self._read[trade.poll_sequence] += 1
                if live and is_early:
                    self._pending[trade.poll_sequence].append(event)
                else:
                    self._trade(event)
            case Candle():
                self._candle(event)
            case PollMarker() if live:
                self._waiting.append((now, event))
            case PollMarker():
                self._marker(event, now)
            case PriceAlert():
                self._alert(event)
            case str():  # an operator removed this instrument from the candles
                self.candles.pop(event, None)
                self.dirty.add(event)
            case DeadLetter():
                self.dead_letters += 1
                self.last_letter = event
            case _:
                self.undecodable += 1

    def go_live(self, now: float) -> None:
        """Take what comes from now on as happening now."""
        if self.live_since is None:
            self.live_since = now
            self.version += 1
            self._forget()
            if self.marker:
                self.news.append(self.marker)

    def settle(self, now: float) -> None:
        """Apply the polls that are whole, in order, and those that waited too long for their events."""
        while self._waiting:
            since, marker = self._waiting[0]
            missing = self._read[marker.poll_sequence] < sum(_counts(marker))
            if missing and now - since < INCOMPLETE_SECONDS:
                return
            self._waiting.popleft()
            self.incomplete += missing
            for sequence in sorted(each for each in self._pending if each <= marker.poll_sequence):
                for located in self._pending.pop(sequence):
                    self._trade(located)
            self._marker(marker, now)
            self.version += 1
        was_silent, self._was_silent = self._was_silent, bool(seconds := self.silent(now))
        if seconds and not was_silent:
            self.news.append(f"no poll for {seconds:.0f} s")

    def _trade(self, located: Located) -> None:
        event, *place = located
        if (known := self.candles.get(event.instrument)) and known.trading_day != event.trading_day:
            if known.trading_day > event.trading_day:
                return
            self.changes.pop(event.instrument, None)
        self._candle(event)
        self.changes[event.instrument][event.sequence] = (*row(event, CHANGE), *place)

    def _candle(self, candle: Candle) -> None:
        known = self.candles.get(candle.instrument)
        if known is None or (known.trading_day, known.sequence) <= (candle.trading_day, candle.sequence):
            self.candles[candle.instrument] = candle
            self.dirty.add(candle.instrument)

    def _marker(self, marker: PollMarker, now: float) -> None:
        before, live = self.marker, self.live_since is not None
        if marker.session_day and marker.session_day != self._day:
            if live and self._day:
                self._close_day()
            self._day = marker.session_day
            self.totals.clear()
            self.markers.clear()
            if live:
                self._forget()
        self.marker, self.marker_at = marker, now
        self.markers.append(marker)
        self.totals.update(dict(zip(OPS, _counts(marker), strict=True)))
        self._applied = max(self._applied, marker.poll_sequence)
        for sequence in [each for each in self._read if each <= self._applied]:
            del self._read[sequence]
        if live:
            self.news.append(marker)
            if before and before.phase is Phase.OPEN and marker.phase is not Phase.OPEN:
                self._close_day()

    def _forget(self) -> None:
        """Drop what belongs to earlier days."""
        day = self.day
        self.episodes = {key: each for key, each in self.episodes.items() if not day or each[0].trading_day >= day}
        current = {candle.instrument for candle in self.today()}
        for instrument in self.changes.keys() - current:
            del self.changes[instrument]
        self.dirty.update(self.candles)

    def _close_day(self) -> None:
        if self._day != self._summed_up:
            self._summed_up = self._day
            self.news.append("; ".join([f"summary of {self._day}", *self.summary()]))

    def _alert(self, alert: PriceAlert) -> None:
        if self.live_since is not None:
            self.news.append(alert)
        fired = self.episodes.get(alert.alert_id, (alert, None))[0]
        self.episodes[alert.alert_id] = (fired, alert if alert.state is AlertState.RESOLVED else None)

    def alerts(self) -> list[Episode]:
        """Return the day's episodes, from FIRING to RESOLVED: open ones first, then the newest first."""
        return sorted(self.episodes.values(), key=lambda each: (each[1] is not None, -each[0].raised_at.timestamp()))

    def gaps(self) -> list[Gap]:
        """Return the day's spans without a good poll: begin, end (None: it lasts), and the last error, if any."""
        gaps: list[Gap] = []
        last, reason = None, ""
        for marker in self.markers:
            if marker.outcome not in {Outcome.PUBLISHED, Outcome.UNCHANGED}:
                reason = error_of(marker) or marker.outcome
                continue
            last = _millis(marker.received_at or marker.requested_at)
            if marker.gap_from:
                gaps.append((_millis(marker.gap_from), last, reason))
            reason = ""
        return [*gaps, (last, None, reason)] if reason and last else gaps

    def silent(self, now: float) -> float | None:
        """Return for how many seconds no marker has come although one is long overdue; None if all is ok."""
        if self.live_since is None:
            return None
        seconds, interval, marker = now - max(self.marker_at, self.live_since), 60.0, self.marker
        if marker and marker.next_poll_at:
            # Both times are of one clock, and their difference passes in ours.
            interval = max(1.0, (marker.next_poll_at - (marker.received_at or marker.requested_at)).total_seconds())
        # The next one may be due tomorrow: it is not overdue by another night.
        return seconds if seconds > interval + min(interval, LATE_SECONDS) + 5 else None

    def trouble(self, subject: str, text: str | None) -> None:
        """Note what does not work, None: it works again."""
        if self.troubles.get(subject) != text:
            self.version += 1
            self.news.append(f"{subject}: {text or 'ok again'}")
            if text is None:
                del self.troubles[subject]
            else:
                self.troubles[subject] = text

    def movers(self) -> list[tuple[float, Candle]]:
        """Return the day's instruments by their change in percent, the largest rise first."""
        changes = [(change, candle) for candle in self.today() if (change := percent(candle)) is not None]
        return sorted(changes, key=lambda pair: (-pair[0], pair[1].instrument))

    def summary(self) -> list[str]:
        """Return the day so far in a few phrases."""
        movers, today = self.movers(), list(self.today())
        rose, fell = sum(change > 0 for change, _ in movers), sum(change < 0 for change, _ in movers)
        ended = [resolved for alert, resolved in self.episodes.values() if alert.trading_day == self.day]
        most = [("up", each) for each in movers[:1] if rose] + [("down", each) for each in movers[-1:] if fell]
        return [
            *(f"{self.totals[op]:,} {op.lower()}" for op in OPS),
            f"{counted(len(today), 'instrument')}: {rose} up, {fell} down",
            f"{sum(candle.value for candle in today):,} rial traded",
            *(f"most {way} {each.instrument} {change:+.2f} % {each.symbol}" for way, (change, each) in most),
            f"alerts {len(ended)} fired, {sum(each is not None for each in ended)} resolved",
        ]
