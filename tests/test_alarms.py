"""Every alarm of prometheus-alerts.yaml fires on what it is for, and not otherwise, as Prometheus evaluates it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parent.parent / "prometheus-alerts.yaml"
ALARMS = [rule["alert"] for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]

Series = dict[str, str]
LEADS = {'bourse_leader{job="p",instance="a"}': "1x60"}
OPEN = {'bourse_session_open{job="p",instance="a"}': "1x60"}
ONE = '{job="p",instance="a"}'


def calls(outcome: str, values: str) -> Series:
    """Return the counter of calls with this outcome."""
    return {f'bourse_exchange_calls_total{{job="p",instance="a",outcome="{outcome}"}}': values}


def of_consumer(name: str, values: str, consumer: str = "archive") -> Series:
    """Return a consumer's metric."""
    return {f'bourse_consumer_{name}{{job="c",instance="a",consumer="{consumer}"}}': values}


# By alarm: the series it fires on after 30 minutes, and series it must be silent on; a sample a minute from time 0 on.
CASES: dict[str, tuple[Series, list[Series]]] = {
    "BourseProducerSilent": (
        # Nobody leads for long: the alarm is of the job.
        {
            **OPEN,
            'bourse_leader{job="p",instance="a"}': "0 1 0x58",
            f"bourse_last_good_poll_timestamp_seconds{ONE}": "0x60",
        },
        [
            {**OPEN, f"bourse_last_good_poll_timestamp_seconds{ONE}": "0+60x60"},
            {
                **OPEN,
                f"bourse_last_good_poll_timestamp_seconds{ONE}": "0x60",
                'bourse_last_good_poll_timestamp_seconds{job="p",instance="b"}': "0+60x60",
            },
            {f"bourse_session_open{ONE}": "0x60", f"bourse_last_good_poll_timestamp_seconds{ONE}": "0x60"},
        ],
    ),
    "BoursePublicationFails": (
        {'bourse_publication_failures_total{job="p",instance="a",step="restore"}': "0+1x60"},
        [{'bourse_publication_failures_total{job="p",instance="a",step="publish"}': "0x25 1x35"}],
    ),
    "BourseNoLeader": ({f"bourse_leader{ONE}": "0x60"}, [LEADS]),
    "BourseNoProducer": ({'up{job="p"}': "0x60"}, [{f"bourse_leader{ONE}": "0x60"}]),
    "BourseTwoLeaders": ({**LEADS, 'bourse_leader{job="p",instance="b"}': "1x60"}, [LEADS]),
    "BourseFencedRepeatedly": (
        {f"bourse_fenced_total{ONE}": "0 0 1 2 3 4x60"},
        [{f"bourse_fenced_total{ONE}": "0 1x60"}],
    ),
    "BourseFeedBad": (
        {**LEADS, 'bourse_feed_state{job="p",instance="a",state="FROZEN"}': "1x60"},
        [
            {**LEADS, 'bourse_feed_state{job="p",instance="a",state="FRESH"}': "1x60"},
            {f"bourse_leader{ONE}": "0x60", 'bourse_feed_state{job="p",instance="a",state="DOWN"}': "1x60"},
        ],
    ),
    "BourseExchangeRefuses": (
        calls("token_scope", "0+1x60"),
        [calls("timeout", "0+1x60"), calls("quota", "0x27 1x40")],
    ),
    "BourseBudgetSpent": (
        {**LEADS, f"bourse_calls_left{ONE}": "0x60"},
        [{**LEADS, f"bourse_calls_left{ONE}": " ".join(["NaN"] * 61)}, {**LEADS, f"bourse_calls_left{ONE}": "1x60"}],
    ),
    "BourseTokenEnds": (
        {**LEADS, f"bourse_token_expires_timestamp_seconds{ONE}": "40000x60"},
        [
            {**LEADS, f"bourse_token_expires_timestamp_seconds{ONE}": "90000x60"},
            {**LEADS, f"bourse_token_expires_timestamp_seconds{ONE}": "0x60"},
        ],
    ),
    "BourseManyTokens": (calls("token_done", "0 1 2 3 4 5x60"), [calls("token_done", "0 1x60")]),
    "BourseContradictions": (
        {'bourse_contradictions_total{job="p",instance="a",kind="foreign_track_id"}': "0+1x60"},
        [{'bourse_contradictions_total{job="p",instance="a",kind="foreign_track_id"}': "0 1x60"}],
    ),
    "BourseClockSkew": (
        {**LEADS, f"bourse_clock_skew_seconds{ONE}": "-6x60"},
        [{**LEADS, f"bourse_clock_skew_seconds{ONE}": "4x60"}],
    ),
    "BourseCalendarEnds": (
        {**LEADS, f"bourse_calendar_days_known{ONE}": "29x120"},
        [{**LEADS, f"bourse_calendar_days_known{ONE}": "30x120"}],
    ),
    "BourseRowsRejected": (
        {f"bourse_rejected_rows_total{ONE}": "0+5x60"},
        [{f"bourse_rejected_rows_total{ONE}": "0 5x60"}],
    ),
    "BourseCaptureFails": (
        {f"bourse_capture_errors_total{ONE}": "0x25 1x35"},
        [{f"bourse_capture_errors_total{ONE}": "1x60"}],
    ),
    "BourseDeadLetters": (of_consumer("dead_letters_total", "0+1x60"), [of_consumer("dead_letters_total", "9x60")]),
    "BourseConsumerLags": (
        of_consumer("lag", "1001+100x60"),
        [of_consumer("lag", "9000-100x60"), of_consumer("lag", "0+9x60")],
    ),
    "BourseConsumerWaits": (of_consumer("retries_total", "0+1x60"), [of_consumer("retries_total", "0 1 2x60")]),
    "BourseArchiveBehind": (
        of_consumer("lag", "60000x60"),
        [of_consumer("lag", "60000x60", "alerts"), of_consumer("lag", "9x60")],
    ),
    "BourseArchiveFindings": (
        {'bourse_archive_findings{job="c",instance="a"}': "1x60"},
        [{'bourse_archive_findings{job="c",instance="a"}': "0x60"}],
    ),
    "BourseChannelTakesNothing": (
        {'bourse_notifications_total{job="c",instance="a",channel="x",outcome="failed"}': "0+1x60"},
        [{'bourse_notifications_total{job="c",instance="a",channel="x",outcome="sent"}': "0+1x60"}],
    ),
    "BourseBrokerLost": (
        {'bourse_kafka_broker_up{job="c",instance="a",client="consumer",broker="1"}': "0x60"},
        [{'bourse_kafka_broker_up{job="c",instance="a",client="producer",broker="1"}': "0x60"}],
    ),
}
MINUTES = {"BourseCalendarEnds": 90}


def case(alarm: str, series: Series, fires: bool) -> dict[str, Any]:
    """Return a unit test in promtool's format."""
    samples = [{"labels": "{}", "value": 1}] if fires else []
    longer = {name: values.replace("x60", "x120") for name, values in series.items()}
    test = {
        "expr": f'count(ALERTS{{alertname="{alarm}",alertstate="firing"}})',
        "eval_time": f"{MINUTES.get(alarm, 30)}m",
        "exp_samples": samples,
    }
    inputs = [{"series": name, "values": values} for name, values in longer.items()]
    return {"interval": "1m", "input_series": inputs, "promql_expr_test": [test]}


def test_every_alarm_has_a_test() -> None:
    """One that fires, and at least one that does not."""
    assert list(CASES) == ALARMS
    assert all(silent for _, silent in CASES.values())


def test_alarms(demand: Callable[[str], None], tmp_path: Path) -> None:
    """Checked and evaluated by promtool."""
    demand("promtool")
    tests = [case(alarm, series, fires=True) for alarm, (series, _) in CASES.items()]
    tests += [case(alarm, series, fires=False) for alarm, (_, silent) in CASES.items() for series in silent]
    file = tmp_path / "alarms.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(file)]):
        run = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_a_wrong_alarm_is_noticed(demand: Callable[[str], None], tmp_path: Path) -> None:
    """The test can fail."""
    demand("promtool")
    file = tmp_path / "alarms.yaml"
    tests = [case("BourseNoLeader", LEADS, fires=True)]
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    run = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode != 0
