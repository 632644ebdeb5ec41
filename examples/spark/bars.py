"""One-minute bars of bourse.trades with Spark Structured Streaming, written as Parquet exactly once."""

import argparse
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  # as everywhere in Spark
from pyspark.sql.avro.functions import from_avro

AVSC = Path(__file__).parents[2] / "schemas" / "bourse_schemas" / "avro" / "TradeEvent.avsc"


def read_trades(spark: SparkSession, options: argparse.Namespace) -> DataFrame:
    """Return the trades as a stream with the fields of the schema."""
    records = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", options.bootstrap_servers)
        .option("subscribe", f"{options.topic_prefix}.trades")
        .option("kafka.isolation.level", "read_committed")  # Spark's default is read_uncommitted
        .option("startingOffsets", "earliest")
        .load()
    )
    # A value is a zero byte, four bytes of schema id, then Avro. SQL counts from 1.
    event = from_avro(F.substring("value", 6, 2**31 - 1), options.schema.read_text("utf-8"))
    return records.select(event.alias("event")).select("event.*")


def bars_of(trades: DataFrame) -> DataFrame:
    """Return a bar per instrument and minute of `observed_at`, once no more of its events can arrive."""
    priced = F.when(F.col("last_price").isNotNull(), F.col("sequence"))  # a null price is not known
    return (
        trades.withWatermark("observed_at", "1 second")
        .groupBy("instrument", F.window("observed_at", "1 minute"))
        .agg(
            F.min_by("last_price", priced).alias("open_price"),
            F.max("last_price").alias("high_price"),
            F.min("last_price").alias("low_price"),
            F.max_by("last_price", priced).alias("close_price"),
            F.sum("volume_delta").alias("volume"),
            F.sum("value_delta").alias("trade_value"),
            F.sum("trade_count_delta").alias("trade_count"),
        )
        .withColumn("minute_start", F.col("window.start"))
        .drop("window")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap-servers", default="127.0.0.1:9092")
    parser.add_argument("--topic-prefix", default="bourse")
    parser.add_argument("--schema", type=Path, default=AVSC, help="TradeEvent.avsc; default: that of this repository")
    parser.add_argument("--output", default="bars", help="folder or object store")
    parser.add_argument("--exit-at-end", action="store_true", help="stop when all that is there has been read")
    options = parser.parse_args()
    spark = SparkSession.builder.config("spark.sql.session.timeZone", "UTC").getOrCreate()
    trigger = {"availableNow": True} if options.exit_at_end else {"processingTime": "10 seconds"}
    query = (
        bars_of(read_trades(spark, options))
        .writeStream.format("parquet")
        .outputMode("append")
        .option("path", options.output)
        .option("checkpointLocation", f"{options.output}-checkpoint")  # offsets and open windows; keep it
        .trigger(**trigger)
        .start()
    )
    query.awaitTermination()


if __name__ == "__main__":
    main()
