package bourse;

import ir.bourse.Candle;
import ir.bourse.Op;
import ir.bourse.TradeEvent;
import java.io.IOException;
import java.io.PrintStream;
import java.math.BigInteger;
import java.nio.charset.StandardCharsets;
import java.security.GeneralSecurityException;
import java.security.MessageDigest;
import java.time.Duration;
import java.time.Instant;
import java.time.LocalDate;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.EnumMap;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.TreeMap;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.apache.avro.specific.SpecificRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.KafkaException;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.errors.TimeoutException;
import org.apache.kafka.common.errors.WakeupException;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.StringDeserializer;

/** Reads bourse.trades and bourse.candles: a live table, day counts and a digest. */
public final class Subscriber {
  private static final BigInteger MODULUS = BigInteger.ONE.shiftLeft(256);

  private final Map<String, Candle> table = new HashMap<>();
  private final Map<LocalDate, EnumMap<Op, Long>> counts = new TreeMap<>();
  private final PrintStream out = new PrintStream(System.out, false, StandardCharsets.UTF_8);
  private BigInteger digest = BigInteger.ZERO;

  public static void main(String[] words) throws Exception {
    Map<String, String> options = new HashMap<>(Map.of("--bootstrap-servers", "127.0.0.1:9092",
        "--registry-url", "http://127.0.0.1:8081", "--topic-prefix", "bourse", "--exit-at-end", "false"));
    for (int i = 0; i < words.length; i++) {
      boolean flag = words[i].equals("--exit-at-end");
      if (!options.containsKey(words[i]) || !flag && i + 1 == words.length) {
        System.err.println("error: unknown or incomplete option " + words[i] + "; there are " + options.keySet());
        System.exit(2);
      }
      options.put(words[i], flag ? "true" : words[++i]);
    }
    try {
      new Subscriber().run(options);
    } catch (TimeoutException error) {
      fail("Kafka at " + options.get("--bootstrap-servers") + " does not answer: " + error.getMessage());
    } catch (KafkaException | IOException | IllegalArgumentException error) {
      fail(error.getCause() instanceof KafkaException cause ? cause.getMessage() : error.getMessage());
    }
  }

  private static void fail(String why) {
    System.err.println("error: " + String.valueOf(why).replaceAll("\\s+", " "));
    Runtime.getRuntime().halt(1); // the hook below waits for a loop that has ended
  }

  private void run(Map<String, String> options) throws Exception {
    String trades = options.get("--topic-prefix") + ".trades";
    String candles = options.get("--topic-prefix") + ".candles";
    String registry = options.get("--registry-url");
    var tradeDecoder = new RegistryDecoder<>(TradeEvent.class, registry);
    var candleDecoder = new RegistryDecoder<>(Candle.class, registry);
    Properties settings = new Properties();
    settings.put("bootstrap.servers", options.get("--bootstrap-servers"));
    settings.put("isolation.level", "read_committed"); // Java's default is read_uncommitted
    settings.put("allow.auto.create.topics", "false");
    settings.put("auto.offset.reset", "none"); // said aloud where records were deleted before they were read
    settings.put("default.api.timeout.ms", "5000");
    settings.put("request.timeout.ms", "4000");
    try (var consumer = new KafkaConsumer<>(settings, new StringDeserializer(), new ByteArrayDeserializer())) {
      List<TopicPartition> partitions = new ArrayList<>(); // no group: every start reads all there is
      for (String topic : List.of(trades, candles)) {
        var found = consumer.partitionsFor(topic);
        if (found == null || found.isEmpty()) {
          throw new IOException("there is no topic " + topic + " at " + options.get("--bootstrap-servers"));
        }
        found.forEach(partition -> partitions.add(new TopicPartition(topic, partition.partition())));
      }
      consumer.assign(partitions);
      consumer.seekToBeginning(partitions);
      boolean exitAtEnd = options.get("--exit-at-end").equals("true");
      var ends = consumer.endOffsets(partitions); // of what is committed
      Thread loop = Thread.currentThread();
      Runtime.getRuntime().addShutdownHook(new Thread(() -> {
        consumer.wakeup();
        try {
          loop.join(5000);
        } catch (InterruptedException ignored) {
          Thread.currentThread().interrupt();
        }
        Runtime.getRuntime().halt(0);
      }));
      try {
        while (!exitAtEnd || partitions.stream().anyMatch(p -> consumer.position(p) < ends.get(p))) {
          var records = consumer.poll(Duration.ofMillis(500));
          for (var record : records) {
            try {
              if (record.topic().equals(trades)) {
                count(tradeDecoder.decode(record.value()));
              } else if (record.value() == null) {
                table.remove(record.key()); // a tombstone
              } else {
                table.put(record.key(), candleDecoder.decode(record.value()));
              }
            } catch (IOException error) {
              String at = record.topic() + " [" + record.partition() + "] at " + record.offset();
              throw new IOException("cannot read " + at + ": " + error.getMessage(), error);
            }
          }
          if (!exitAtEnd && !records.isEmpty()) {
            show();
          }
        }
      } catch (WakeupException stopped) {
        // Ctrl-C
      }
    }
    show();
  }

  private void count(TradeEvent trade) throws GeneralSecurityException {
    counts.computeIfAbsent(trade.getTradingDay(), day -> new EnumMap<>(Op.class)).merge(trade.getOp(), 1L, Long::sum);
    String line = trade.getSchema().getFields().stream().map(field -> text(trade.get(field.pos()))).collect(Collectors.joining("\t"));
    byte[] hash = MessageDigest.getInstance("SHA-256").digest(line.getBytes(StandardCharsets.UTF_8));
    digest = digest.add(new BigInteger(1, hash)).mod(MODULUS);
  }

  /** One field in the canonical form of ../README.md. */
  private static String text(Object value) {
    if (value instanceof String || value instanceof Enum) return '"' + value.toString() + '"';
    if (value instanceof Double number) return String.format("%016x", Double.doubleToRawLongBits(number));
    if (value instanceof LocalDate day) return Long.toString(day.toEpochDay());
    if (value instanceof Instant instant) return Long.toString(instant.toEpochMilli());
    return String.valueOf(value);
  }

  private void show() {
    out.print("symbol\tlast\tclosing\tvolume\tvalue\ttrades\n");
    table.values().stream()
        .sorted(Comparator.comparingLong(Candle::getValue).reversed().thenComparing(Candle::getInstrument)).limit(10)
        .map(c -> Stream.of(c.getSymbol(), c.getLastPrice(), c.getClosingPrice(), c.getVolume(), c.getValue(), c.getTradeCount()))
        .forEach(row -> out.print(row.map(cell -> cell == null ? "-" : cell.toString()).collect(Collectors.joining("\t", "", "\n"))));
    long all = 0;
    for (var day : counts.entrySet()) {
      long total = day.getValue().values().stream().mapToLong(Long::longValue).sum();
      String ops = Arrays.stream(Op.values()).map(op -> op + "=" + day.getValue().getOrDefault(op, 0L)).collect(Collectors.joining(" "));
      out.print(day.getKey() + " " + ops + " total=" + total + "\n");
      all += total;
    }
    out.print(String.format("candles=%d trades=%d digest=%064x%n", table.size(), all, digest));
    out.flush();
  }
}
