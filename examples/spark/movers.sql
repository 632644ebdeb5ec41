-- The ten largest rises of a day: last price against the previous close, in percent.
SELECT symbol, last_price, change FROM (
  SELECT
    *,
    100 * CAST(last_price - previous_close AS DOUBLE) / previous_close AS change,
    ROW_NUMBER() OVER (PARTITION BY instrument ORDER BY sequence DESC) AS age
  FROM trades
  WHERE trading_day = DATE '2019-08-21'
)
WHERE age = 1
ORDER BY change DESC, instrument
LIMIT 10;
