"""Alerts while consumers are killed and frozen and the broker restarts: `make chaos-alerts KILLS=200 SEED=1`.

A real day is produced meanwhile. Afterwards the alerts on the topic are compared with those that the same rules raise
for the same polls in one process, undisturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec import structs
from msgspec.structs import asdict

from bourse_cli.topics import apply_topics, plan_topics
from bourse_consumers.alerts.rules_file import RuleFiles
from bourse_consumers.alerts.trial import Past, Trial, polls_of
from bourse_producer.replay import Replay
from bourse_sandbox.kafka import Kafka
from bourse_sandbox.market import REAL_DAY
from bourse_sandbox.registry import serve_registry
from bourse_schemas.codec import to_json
from bourse_schemas.errors import Unreachable
from bourse_schemas.events import PriceAlert
from bourse_schemas.kafka import Cluster
from bourse_schemas.reading import group_lag, read
from bourse_schemas.topics import ALERTS, POLLS, TRADES
from reliability import day
from reliability.chaos_archive import SECONDS_A_KILL, SETTLE_SECONDS, Members

__all__ = ["feed", "main", "run"]

SHOWN = 5
RULES = Path(__file__).parent.parent / "examples" / "rules.yaml"


class _Alerts:
    """The consumers of one group; they publish on the topic of alerts."""

    command: Sequence[str] = ("alerts", "--rules", str(RULES))
    alone = False

    @staticmethod
    def limits(chance: random.Random, *, last: bool) -> list[str]:
        return [f"--batch-size={1_000 if last else chance.choice([5, 50, 500])}"]


def run(kills: int, seed: int, members: int, folder: Path, broker_restarts: bool = True) -> dict[str, Any]:
    """Do it; return what was found."""
    replay = Replay()
    replay.day(REAL_DAY)
    # The day is long ago: nothing may be judged by the clock.
    polls = [Past(structs.replace(marker, simulated=True), events) for marker, events in polls_of(replay.events)]
    trial = Trial(RuleFiles([RULES]).rules)
    trial.run(polls)
    expected = Counter(map(_text, trial.alerts))
    chance = random.Random(seed)  # repeatable on purpose
    done: Counter[str] = Counter(kills=0, freezes=0, broker_restarts=0)
    with ExitStack() as stack:
        broker = stack.enter_context(Kafka())
        cluster = Cluster(broker.bootstrap_servers, stack.enter_context(serve_registry()).url, "chaos")
        apply_topics(cluster, plan_topics(cluster, {}, 1, any_time=True))
        cluster.registry().register_all(cluster.prefix)
        environment = {
            **os.environ,
            "BOURSE_BOOTSTRAP_SERVERS": cluster.bootstrap_servers,
            "BOURSE_REGISTRY_URL": cluster.registry_url,
            "BOURSE_TOPIC_PREFIX": cluster.prefix,
        }
        group = Members(_Alerts(), environment, folder, chance, broker if broker_restarts else None)
        stack.callback(group.stop)
        fed = threading.Event()
        about = cluster, polls, kills * SECONDS_A_KILL, fed
        feeder = threading.Thread(target=feed, args=about, daemon=True)
        for _ in range(members):
            group.start()
        # A group without committed polls begins at the end: nothing is fed before it has.
        until = time.monotonic() + SETTLE_SECONDS
        while _behind(cluster) and time.monotonic() < until:
            time.sleep(0.5)
        feeder.start()
        while done.total() < kills:
            time.sleep(chance.uniform(0.2, 2 * SECONDS_A_KILL))
            group.thaw()
            done[group.strike()] += 1
            # One that hung in a call of the client has ended itself; it is started again when it is struck.
            if died := [log for log in group.died() if "did not return within" not in log]:
                raise SystemExit(f"a member ended by itself:\n{died[0]}")
        feeder.join()
        if not fed.is_set():
            raise SystemExit("the day could not be produced")
        group.stop()
        group.start("common")
        until = time.monotonic() + SETTLE_SECONDS
        while _behind(cluster) and time.monotonic() < until:
            time.sleep(0.5)
        group.stop()
        decode = cluster.registry().deserializer(PriceAlert)
        records = read(cluster, ALERTS.full_name(cluster.prefix), pending=True, timeout=60)
        found = Counter(_text(decode(record.value)) for record in records)
    for what, some in (("lost", expected - found), ("wrong", found - expected)):
        for text in sorted(some)[:SHOWN]:
            print(f"{what}: {text}", file=sys.stderr)
    return {
        "kills": done["kills"],
        "freezes": done["freezes"],
        "broker_restarts": done["broker_restarts"],
        "expected": expected.total(),
        "found": found.total(),
        "lost": (expected - found).total(),
        "twice": found.total() - len(found),
        "wrong": len(found.keys() - expected.keys()),
    }


def _text(alert: PriceAlert) -> str:
    """Return an alert as text, whatever the order of its maps."""
    return json.dumps(json.loads(to_json(asdict(alert))), sort_keys=True, ensure_ascii=False)


def feed(cluster: Cluster, polls: Sequence[Past], seconds: float, fed: threading.Event) -> None:
    """Publish the day, a transaction per poll with its marker, within about this time."""
    registry = cluster.registry()
    trades, marks = (registry.serializer(topic, cluster.prefix) for topic in (TRADES, POLLS))
    day.feed(cluster, [[*map(trades, events), marks(marker)] for marker, events in polls], seconds, fed)


def _behind(cluster: Cluster) -> bool:
    """Return whether the group has not committed all there is."""
    try:
        return group_lag(cluster, ["common"])[0].lag != 0
    except Unreachable:  # a broker that has just started
        return True


def main() -> int:
    """Read the command line, do it, print one line of JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--broker-restarts", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bourse-chaos-alerts-") as folder:
        result = run(given.kills, given.seed, given.members, Path(folder), given.broker_restarts)
    print(json.dumps(result))
    return int(bool(result["lost"] or result["twice"] or result["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
