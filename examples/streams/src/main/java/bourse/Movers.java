package bourse;

import java.time.Duration;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import org.apache.avro.generic.GenericRecord;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StoreQueryParameters;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.state.QueryableStoreTypes;

/** The ten largest rises of the newest trading day: last price against the previous close, in percent. */
public final class Movers {
  record Mover(String instrument, Object symbol, long price, double change) {}

  public static void main(String[] files) throws Exception {
    var settings = Bars.settings(files);
    settings.put("application.id", settings.getProperty("application.id") + "-movers");
    var topic = settings.getProperty("bourse.topic.prefix") + ".candles";
    var values = Bars.values(settings, "Candle");
    var builder = new StreamsBuilder();
    // A global table: the largest of all partitions are wanted.
    builder.globalTable(topic, Consumed.with(Serdes.String(), Serdes.ByteArray()), Materialized.as("candles"));
    var streams = new KafkaStreams(builder.build(), settings);
    try {
      streams.start(); // returns when the table is read
      var store = StoreQueryParameters.fromNameAndType("candles",
          QueryableStoreTypes.<String, byte[]>keyValueStore());
      List<GenericRecord> candles = new ArrayList<>();
      try (var rows = streams.store(store).all()) {
        rows.forEachRemaining(row -> candles.add(values.deserialize(topic, row.value)));
      }
      int today = candles.stream().mapToInt(candle -> (int) candle.get("trading_day")).max().orElseThrow();
      candles.stream()
          .filter(candle -> (int) candle.get("trading_day") == today) // others were not traded yet
          .filter(candle -> candle.get("last_price") != null && candle.get("previous_close") != null)
          .map(Movers::mover)
          .sorted(Comparator.comparing(Mover::change).reversed().thenComparing(Mover::instrument))
          .limit(10)
          .forEach(mover -> System.out.println(mover.symbol + "\t" + mover.price + "\t" + mover.change));
    } finally {
      streams.close(Duration.ofSeconds(10));
    }
  }

  static Mover mover(GenericRecord candle) {
    long price = (long) candle.get("last_price");
    long before = (long) candle.get("previous_close");
    return new Mover(candle.get("instrument").toString(), candle.get("symbol"), price, 100.0 * (price - before) / before);
  }
}
