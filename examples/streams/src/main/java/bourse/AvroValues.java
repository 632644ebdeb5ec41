package bourse;

import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.File;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.DecoderFactory;
import org.apache.kafka.common.errors.SerializationException;
import org.apache.kafka.common.serialization.Deserializer;

/** Reads the wire format: a zero byte, four bytes of schema id, Avro as the schema of that id wrote it. */
record AvroValues(String registry, Schema ours, HttpClient http, Map<Integer, Schema> writers)
    implements Deserializer<GenericRecord> {
  AvroValues(String registry, File schema) throws IOException {
    this(registry, new Schema.Parser().parse(schema), HttpClient.newHttpClient(), new ConcurrentHashMap<>());
  }

  @Override
  public GenericRecord deserialize(String topic, byte[] value) {
    ByteBuffer bytes = ByteBuffer.wrap(value);
    if (value.length < 5 || bytes.get() != 0) {
      throw new SerializationException("it does not begin with a zero byte and a schema id");
    }
    try {
      int id = bytes.getInt();
      if (!writers.containsKey(id)) { // an id's schema never changes
        writers.put(id, writer(id));
      }
      // Whatever the writer's version, the result has the fields of our schema.
      var reader = new GenericDatumReader<GenericRecord>(writers.get(id), ours);
      return reader.read(null, DecoderFactory.get().binaryDecoder(value, 5, value.length - 5, null));
    } catch (IOException | InterruptedException error) {
      throw new SerializationException(error);
    }
  }

  private Schema writer(int id) throws IOException, InterruptedException {
    var question = HttpRequest.newBuilder(URI.create(registry + "/schemas/ids/" + Integer.toUnsignedString(id)));
    var answer = http.send(question.timeout(Duration.ofSeconds(5)).build(), BodyHandlers.ofString());
    if (answer.statusCode() != 200) {
      throw new IOException("schema id " + id + ": the registry at " + registry + " answers " + answer.statusCode());
    }
    return new Schema.Parser().parse(new ObjectMapper().readTree(answer.body()).path("schema").asText());
  }
}
