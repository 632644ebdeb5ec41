"""Reads bourse.trades and bourse.candles with confluent-kafka alone: a live table, day counts and a digest."""

import argparse
import hashlib
import json
import struct
import sys
from collections import Counter
from datetime import UTC, date, datetime
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

EPOCH, OPS = datetime(1970, 1, 1, tzinfo=UTC), ["OPENED", "TRADED", "REVISED", "CANCELLED", "UNKNOWN"]


def text(value):
    """One field in the canonical form of ../README.md."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return f'"{value}"'
        case float():
            return struct.pack(">d", value).hex()
        case datetime():
            return str(round((value - EPOCH).total_seconds() * 1000))
        case date():
            return str((value - EPOCH.date()).days)
    return str(value)


def show(table, counts, digest):
    print("symbol\tlast\tclosing\tvolume\tvalue\ttrades")
    for candle in sorted(table.values(), key=lambda candle: (-candle["value"], candle["instrument"]))[:10]:
        columns = ("symbol", "last_price", "closing_price", "volume", "value", "trade_count")
        print(*("-" if candle[column] is None else candle[column] for column in columns), sep="\t")
    for day, ops in sorted(counts.items()):
        print(day, *(f"{op}={ops[op]}" for op in OPS), f"total={ops.total()}")
    print(f"candles={len(table)} trades={sum(ops.total() for ops in counts.values())} digest={digest:064x}", flush=True)


def run(options):
    registry = SchemaRegistryClient({"url": options.registry_url, "timeout": 5, "max.retries": 1})
    readers = {
        f"{options.topic_prefix}.{name}": AvroDeserializer(
            registry, (options.schemas / f"{avsc}.avsc").read_text("utf-8")
        )
        for name, avsc in {"trades": "TradeEvent", "candles": "Candle"}.items()
    }
    trades = f"{options.topic_prefix}.trades"
    fields = [field["name"] for field in json.loads((options.schemas / "TradeEvent.avsc").read_text("utf-8"))["fields"]]
    # No group: every start reads all there is. librdkafka writes its own view of errors to stderr unless told.
    settings = {"bootstrap.servers": options.bootstrap_servers, "group.id": "unused", "enable.auto.commit": False}
    settings |= {"isolation.level": "read_committed", "enable.partition.eof": True, "log_level": 0}
    consumer = Consumer(settings)
    behind = set()
    for topic in readers:
        try:
            metadata = consumer.list_topics(topic, timeout=5).topics[topic]
        except KafkaException as error:
            raise ValueError(f"Kafka at {options.bootstrap_servers}: {error.args[0].str()}") from error
        if metadata.error:
            raise ValueError(f"{topic} at {options.bootstrap_servers}: {metadata.error.str()}")
        behind |= {(topic, partition) for partition in metadata.partitions}
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for topic, partition in behind])
    table, counts, digest, changed = {}, {}, 0, False
    try:
        while behind or not options.exit_at_end:
            message = consumer.poll(1)
            if message is None or (message.error() and message.error().code() == KafkaError._PARTITION_EOF):
                if message is not None:
                    behind.discard((message.topic(), message.partition()))
                if changed and not behind and not options.exit_at_end:
                    show(table, counts, digest)
                    changed = False
                continue
            if message.error():
                raise KafkaException(message.error())
            at = f"{message.topic()} [{message.partition()}] at {message.offset()}"
            try:
                context = SerializationContext(message.topic(), MessageField.VALUE)
                value = readers[message.topic()](message.value(), context)
            except Exception as error:
                raise ValueError(f"cannot read {at} with the registry at {options.registry_url}: {error}") from error
            if value is None and message.topic() == trades:
                raise ValueError(f"cannot read {at}: it is empty")
            if value is None:
                table.pop(message.key().decode(), None)  # a tombstone
            elif message.topic() == trades:
                counts.setdefault(value["trading_day"], Counter())[value["op"]] += 1
                line = "\t".join(text(value[field]) for field in fields).encode()
                digest = (digest + int.from_bytes(hashlib.sha256(line).digest(), "big")) % 2**256
            else:
                table[value["instrument"]] = value
            changed = True
    except KeyboardInterrupt:
        pass
    finally:
        consumer.close()
    show(table, counts, digest)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--bootstrap-servers", default="127.0.0.1:9092")
parser.add_argument("--registry-url", default="http://127.0.0.1:8081")
parser.add_argument("--topic-prefix", default="bourse")
parser.add_argument("--schemas", type=Path, default=Path(__file__).parents[2] / "schemas" / "bourse_schemas" / "avro")
parser.add_argument("--exit-at-end", action="store_true", help="stop when all that is there has been read")
try:
    run(parser.parse_args())
except (KafkaException, ValueError, OSError) as problem:
    sys.exit(f"error: {' '.join(str(problem).split())}")
