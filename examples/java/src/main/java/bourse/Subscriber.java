package bourse;

import ir.bourse.Candle;
import ir.bourse.TradeEvent;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HashMap;
import java.util.Map;
import java.util.TreeMap;
import java.util.function.BinaryOperator;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.KafkaException;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.StringDeserializer;

/** Reads bourse.trades and bourse.candles: a live table and each day's counts, or the trades as lines of JSON. */
public final class Subscriber {
  private static final Comparator<Candle> BY_DAY_AND_SEQUENCE =
      Comparator.comparing(Candle::getTradingDay).thenComparing(Candle::getSequence);
  private final Map<String, Candle> table = new HashMap<>();
  private final Map<String, Long> counts = new TreeMap<>(); // by day and op

  public static void main(String[] words) {
    System.setOut(new PrintStream(System.out, true, StandardCharsets.UTF_8));
    Map<String, String> options = new HashMap<>(Map.of("--bootstrap-servers", "127.0.0.1:9092", "--registry-url",
        "http://127.0.0.1:8081", "--topic-prefix", "bourse", "--exit-at-end", "no", "--json", "no"));
    try {
      for (int i = 0; i < words.length; i++) {
        if (!options.containsKey(words[i])) {
          throw new IllegalArgumentException("unknown option " + words[i]);
        }
        options.put(words[i], "no".equals(options.get(words[i])) ? "yes" : words[++i]);
      }
      new Subscriber().run(options);
    } catch (RuntimeException error) {
      String why = error + (error.getCause() == null ? "" : ": " + error.getCause().getMessage());
      System.err.println("error: " + why.replaceAll("\\s+", " ") + " " + options);
      System.exit(1);
    }
  }

  private void run(Map<String, String> options) {
    boolean json = options.get("--json").equals("yes");
    boolean exitAtEnd = options.get("--exit-at-end").equals("yes");
    Map<String, Object> settings = Map.of("bootstrap.servers", options.get("--bootstrap-servers"),
        "isolation.level", "read_committed", // Java's default is read_uncommitted
        "allow.auto.create.topics", false,
        "auto.offset.reset", "none", // fails if records were deleted before they were read
        "default.api.timeout.ms", 5000, "request.timeout.ms", 4000);
    var values = new RegistryDeserializer(options.get("--registry-url"));
    try (var consumer = new KafkaConsumer<>(settings, new StringDeserializer(), values)) {
      var partitions = new ArrayList<TopicPartition>(); // no group: every start reads all there is
      for (String name : new String[] {".trades", ".candles"}) {
        String topic = options.get("--topic-prefix") + name;
        var found = consumer.partitionsFor(topic);
        if (found.isEmpty()) throw new KafkaException("topic " + topic + " not found");
        found.forEach(each -> partitions.add(new TopicPartition(topic, each.partition())));
      }
      consumer.assign(partitions);
      consumer.seekToBeginning(partitions);
      var ends = consumer.endOffsets(partitions); // of what is committed
      while (!exitAtEnd || partitions.stream().anyMatch(each -> consumer.position(each) < ends.get(each))) {
        var records = consumer.poll(Duration.ofMillis(500));
        for (var record : records) {
          if (record.value() instanceof Candle candle) {
            // A topic that got more partitions has an older candle in the instrument's partition of before.
            table.merge(record.key(), candle, BinaryOperator.maxBy(BY_DAY_AND_SEQUENCE));
          } else if (record.value() instanceof TradeEvent trade) {
            counts.merge(trade.getTradingDay() + " " + trade.getOp(), 1L, Long::sum);
            if (json) {
              System.out.println(trade);
            }
          } else if (record.topic().endsWith(".candles")) { // a tombstone
            table.remove(record.key());
          } else {
            throw new KafkaException(record.topic() + "-" + record.partition() + " at " + record.offset() + " is empty");
          }
        }
        if (!json && !exitAtEnd && !records.isEmpty()) {
          show();
        }
      }
    }
    if (!json) {
      show();
    }
  }

  private void show() {
    System.out.println("symbol\tlast\tclosing\tvolume\tvalue\ttrades");
    table.values().stream().sorted((a, b) -> Long.compare(b.getValue(), a.getValue())).limit(10)
        .forEach(c -> System.out.printf("%s\t%s\t%s\t%s\t%s\t%s%n", c.getSymbol(), c.getLastPrice(), c.getClosingPrice(),
            c.getVolume(), c.getValue(), c.getTradeCount()));
    counts.forEach((dayAndOp, count) -> System.out.println(dayAndOp + " " + count));
  }
}
