package bourse;

import com.fasterxml.jackson.databind.ObjectMapper;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.HashMap;
import java.util.Map;
import org.apache.avro.Schema;
import org.apache.avro.message.RawMessageDecoder;
import org.apache.avro.specific.SpecificData;
import org.apache.avro.specific.SpecificRecord;
import org.apache.kafka.common.errors.SerializationException;
import org.apache.kafka.common.serialization.Deserializer;

/** Reads the wire format: a zero byte, four bytes of schema id, Avro as the schema of that id wrote it. */
record RegistryDeserializer(String url, HttpClient http, Map<Integer, RawMessageDecoder<SpecificRecord>> known)
    implements Deserializer<SpecificRecord> {
  RegistryDeserializer(String url) {
    this(url, HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(5)).build(), new HashMap<>());
  }

  @Override
  public SpecificRecord deserialize(String topic, byte[] value) {
    ByteBuffer bytes = ByteBuffer.wrap(value);
    if (value.length < 5 || bytes.get() != 0) {
      throw new SerializationException("it does not begin with a zero byte and a schema id");
    }
    int id = bytes.getInt();
    try {
      if (!known.containsKey(id)) { // an id's schema never changes
        known.put(id, decoder(id));
      }
      return known.get(id).decode(bytes);
    } catch (Exception error) {
      throw new SerializationException("schema id " + id + " of the registry at " + url + ": " + error, error);
    }
  }

  private RawMessageDecoder<SpecificRecord> decoder(int id) throws Exception {
    var question = HttpRequest.newBuilder(URI.create(url + "/schemas/ids/" + Integer.toUnsignedString(id)));
    var answer = http.send(question.timeout(Duration.ofSeconds(5)).build(), BodyHandlers.ofString());
    if (answer.statusCode() != 200) {
      throw new IllegalStateException("it answers HTTP " + answer.statusCode());
    }
    Schema writer = new Schema.Parser().parse(new ObjectMapper().readTree(answer.body()).path("schema").asText());
    Class<?> type = Class.forName(writer.getFullName());
    // Whatever the writer's version, it is resolved against the schema that this program was built with.
    return new RawMessageDecoder<>(SpecificData.getForClass(type), writer, SpecificData.get().getSchema(type));
  }
}
