"""Reads bourse.trades and bourse.candles with confluent-kafka alone: a live table and each day's counts, or JSON."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer


def main(options):
    registry = SchemaRegistryClient({"url": options.registry_url, "timeout": 5, "max.retries": 1})
    trades, candles = (f"{options.topic_prefix}.{name}" for name in ("trades", "candles"))
    # Given our schema, it resolves what other versions wrote.
    avsc = {trades: "TradeEvent.avsc", candles: "Candle.avsc"}
    decode = {topic: AvroDeserializer(registry, (options.schemas / avsc[topic]).read_text("utf-8")) for topic in avsc}
    # No group: every start reads all there is. Of what goes wrong librdkafka prints the same on stderr by default.
    settings = {"bootstrap.servers": options.bootstrap_servers, "group.id": "unused", "enable.auto.commit": False}
    settings |= {"isolation.level": "read_committed", "enable.partition.eof": True, "log_level": 0}
    consumer = Consumer(settings)
    found = {topic: consumer.list_topics(topic, timeout=5).topics[topic] for topic in avsc}
    if missing := [topic for topic in avsc if found[topic].error]:
        raise ValueError(f"topic {missing[0]} not found")
    behind = {(topic, partition) for topic in avsc for partition in found[topic].partitions}
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for topic, partition in behind])
    table, counts = {}, Counter()
    while behind or not options.exit_at_end:
        message = consumer.poll(1)
        if message is None:
            continue
        topic, partition = message.topic(), message.partition()
        if message.error() and message.error().code() != KafkaError._PARTITION_EOF:
            raise KafkaException(message.error())
        if message.error():  # all that was there has been read
            behind.discard((topic, partition))
            if not behind and not options.json:
                show(table, counts)
        elif message.value() is None and topic == candles:
            table.pop(message.key(), None)  # a tombstone
        else:
            try:
                value = decode[topic](message.value())
                if topic == candles:
                    # A topic that got more partitions has an older candle in the instrument's partition of before.
                    table[message.key()] = max(table.get(message.key(), value), value, key=day_and_sequence)
                else:
                    counts[value["trading_day"], value["op"]] += 1
            except Exception as error:
                raise ValueError(f"cannot read {topic} [{partition}] at {message.offset()}: {error!r}") from error
            if options.json and topic == trades:
                print(json.dumps(value, default=str, ensure_ascii=False), flush=True)


def day_and_sequence(candle):
    return candle["trading_day"], candle["sequence"]


def show(table, counts):
    print("symbol\tlast\tclosing\tvolume\tvalue\ttrades")
    for candle in sorted(table.values(), key=lambda candle: -candle["value"])[:10]:
        columns = ("symbol", "last_price", "closing_price", "volume", "value", "trade_count")
        print(*(candle[column] for column in columns), sep="\t")
    for (day, op), count in sorted(counts.items()):
        print(day, op, count)
    sys.stdout.flush()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--bootstrap-servers", default="127.0.0.1:9092")
parser.add_argument("--registry-url", default="http://127.0.0.1:8081")
parser.add_argument("--topic-prefix", default="bourse")
parser.add_argument("--schemas", type=Path, default=Path(__file__).parents[2] / "schemas" / "bourse_schemas" / "avro")
parser.add_argument("--exit-at-end", action="store_true", help="stop when all that is there has been read")
parser.add_argument("--json", action="store_true", help="print every trade as a line of JSON instead of the table")
arguments = parser.parse_args()
try:
    main(arguments)
except KeyboardInterrupt:
    pass
except (KafkaException, ValueError, OSError) as problem:
    where = f"Kafka at {arguments.bootstrap_servers}, registry at {arguments.registry_url}"
    sys.exit(f"error: {' '.join(str(problem).split())} ({where})")
