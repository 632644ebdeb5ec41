"""`bourse schemas ddl`: the table definitions of every topic, and that databases take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from bourse_cli.ddl import ENGINES, table_definition
from bourse_schemas.codec import avro_schema
from bourse_schemas.kafka import Cluster
from bourse_schemas.topics import TOPICS

GOLDEN = Path(__file__).parent.parent / "golden"
CLUSTER = Cluster("127.0.0.1:9092", "http://127.0.0.1:8081", "bourse")


def all_tables(engine: str) -> str:
    """Return the definitions of all topics."""
    return "\n".join(table_definition(engine, topic, CLUSTER) for topic in TOPICS)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_definitions_of_all_topics(engine: str, rewrite_golden: bool) -> None:
    """They are those of the golden file; `make test-engines` runs Flink's and Spark's."""
    golden = GOLDEN / f"ddl-{engine}.sql"
    if rewrite_golden:
        golden.write_text(all_tables(engine), "utf-8")
    assert all_tables(engine) == golden.read_text("utf-8")


def test_duckdb_and_postgresql_take_them(dsn: str) -> None:
    """Each table has the columns of the schema, in their order."""
    columns = {topic.name: [field["name"] for field in avro_schema(topic.event)["fields"]] for topic in TOPICS}
    listing = (
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = '{}' ORDER BY table_name, ordinal_position"
    )
    with duckdb.connect() as duck, psycopg.connect(dsn) as postgres:
        duck.execute(all_tables("duckdb"))
        postgres.execute(all_tables("postgres").encode())
        found: list[list[tuple[Any, ...]]] = [
            duck.execute(listing.format("main")).fetchall(),
            postgres.execute(listing.format("public").encode()).fetchall(),
        ]
    for rows in found:
        assert {name: [column for table, column in rows if table == name] for name in columns} == columns


def test_the_command_names_the_cluster_and_refuses_another_engine(bourse: Callable[..., Any]) -> None:
    """Addresses and prefix are the options'; an unknown engine or topic is exit code 2."""
    options = ["--bootstrap-servers", "kafka:1", "--registry-url", "http://registry:2", "--topic-prefix", "tse"]
    code, out, _ = bourse("schemas", "ddl", "flink", "tse.trades", *options)
    assert code == 0
    for setting in ("'kafka:1'", "'http://registry:2'", "'tse.trades'"):
        assert setting in out
    assert bourse("schemas", "ddl", "oracle", "trades")[0] == 2
    assert bourse("schemas", "ddl", "flink", "nosuch")[0] == 2
