-- One-minute bars of bourse.trades in bourse.bars, exactly once. The table `trades` is what `bourse schemas ddl` prints.
-- A bar is visible at the checkpoint after its minute.
SET 'execution.checkpointing.interval' = '10 s';
SET 'table.dml-sync' = 'true';

CREATE TABLE bars (
  instrument STRING NOT NULL,
  minute_start TIMESTAMP(3) NOT NULL, -- UTC
  open_price BIGINT, -- a price is null if no event of the minute had one
  high_price BIGINT,
  low_price BIGINT,
  close_price BIGINT,
  volume BIGINT NOT NULL, -- negative if more was annulled than traded
  trade_value BIGINT NOT NULL,
  trade_count BIGINT NOT NULL
) WITH (
  'connector' = 'kafka',
  'topic' = 'bourse.bars',
  'properties.bootstrap.servers' = '127.0.0.1:9092',
  'key.format' = 'raw',
  'key.fields' = 'instrument',
  'value.format' = 'avro-confluent',
  'value.avro-confluent.url' = 'http://127.0.0.1:8081',
  'sink.delivery-guarantee' = 'exactly-once',
  'sink.transactional-id-prefix' = 'bourse-bars',
  'properties.transaction.timeout.ms' = '600000' -- longer than the longest restart; brokers allow 15 minutes
);

INSERT INTO bars
SELECT
  instrument, window_start,
  FIRST_VALUE(last_price), MAX(last_price), MIN(last_price), LAST_VALUE(last_price),
  SUM(volume_delta), SUM(value_delta), SUM(trade_count_delta)
FROM TABLE(TUMBLE(TABLE trades, DESCRIPTOR(observed_at), INTERVAL '1' MINUTE))
GROUP BY instrument, window_start, window_end;
