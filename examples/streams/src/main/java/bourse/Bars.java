package bourse;

import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Map;
import java.util.Properties;
import org.apache.avro.generic.GenericRecord;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.state.WindowStore;

/** One-minute bars of bourse.trades as a table, bourse.bars-table: the newest record of each key is the bar. */
public final class Bars {
  /** A price is null if no event of the minute had one. */
  public record Bar(Long open, Long high, Long low, Long close, long volume, long value, long count) {
    static final Bar EMPTY = new Bar(null, null, null, null, 0, 0, 0);

    Bar add(GenericRecord trade) {
      Long price = (Long) trade.get("last_price");
      return new Bar(open == null ? price : open, // in the order of the partition
          price == null || high != null && high > price ? high : price,
          price == null || low != null && low < price ? low : price,
          price == null ? close : price,
          volume + (long) trade.get("volume_delta"), // negative if trades were annulled
          value + (long) trade.get("value_delta"),
          count + (long) trade.get("trade_count_delta"));
    }
  }

  static Topology topology(String prefix, Serde<GenericRecord> trades) {
    var builder = new StreamsBuilder();
    // A record's timestamp is its observed_at: no extractor is needed.
    builder.stream(prefix + ".trades", Consumed.with(Serdes.String(), trades))
        .groupByKey()
        .windowedBy(TimeWindows.ofSizeAndGrace(Duration.ofMinutes(1), Duration.ofMinutes(1)))
        .aggregate(() -> Bar.EMPTY, (instrument, trade, bar) -> bar.add(trade),
            Materialized.<String, Bar, WindowStore<Bytes, byte[]>>as("bars")
                .withKeySerde(Serdes.String()).withValueSerde(json())
                // For days of the past: Kafka would delete state whose time is older than the store's retention.
                .withLoggingEnabled(Map.of("retention.ms", "-1")))
        .toStream((window, bar) -> window.key() + "@" + window.window().startTime())
        .to(prefix + ".bars-table", Produced.with(Serdes.String(), json()));
    return builder.build();
  }

  static Serde<Bar> json() {
    var mapper = new ObjectMapper();
    return Serdes.serdeFrom((topic, bar) -> {
      try {
        return mapper.writeValueAsBytes(bar);
      } catch (IOException error) {
        throw new UncheckedIOException(error);
      }
    }, (topic, bytes) -> {
      try {
        return bytes == null ? null : mapper.readValue(bytes, Bar.class);
      } catch (IOException error) {
        throw new UncheckedIOException(error);
      }
    });
  }

  static Properties settings(String[] files) throws IOException {
    var settings = new Properties();
    try (var file = Files.newBufferedReader(Path.of(files.length > 0 ? files[0] : "bars.properties"))) {
      settings.load(file);
    }
    return settings;
  }

  static AvroValues values(Properties settings, String schema) throws IOException {
    var file = Path.of(settings.getProperty("bourse.schemas"), schema + ".avsc").toFile();
    return new AvroValues(settings.getProperty("bourse.registry.url"), file);
  }

  public static void main(String[] files) throws IOException {
    var settings = settings(files);
    var trades = Serdes.serdeFrom((topic, trade) -> {
      throw new UnsupportedOperationException("trades are only read");
    }, values(settings, "TradeEvent"));
    var streams = new KafkaStreams(topology(settings.getProperty("bourse.topic.prefix"), trades), settings);
    streams.setStateListener((now, before) -> {
      if (now == KafkaStreams.State.ERROR) { // the log has printed why
        Runtime.getRuntime().halt(1);
      }
    });
    Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(10))));
    streams.start();
  }
}
