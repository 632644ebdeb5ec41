package bourse;

import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.HashMap;
import java.util.Map;
import org.apache.avro.AvroRuntimeException;
import org.apache.avro.Schema;
import org.apache.avro.io.DatumReader;
import org.apache.avro.io.DecoderFactory;
import org.apache.avro.specific.SpecificData;
import org.apache.avro.specific.SpecificDatumReader;
import org.apache.avro.specific.SpecificRecord;

/** Decodes the wire format: a zero byte, four bytes of schema id, Avro as the schema of that id wrote it. */
final class RegistryDecoder<T extends SpecificRecord> {
  private final Class<T> type;
  private final String registryUrl;
  private final HttpClient http = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(5)).build();
  private final Map<Integer, DatumReader<T>> readers = new HashMap<>(); // an id's schema never changes

  RegistryDecoder(Class<T> type, String registryUrl) {
    this.type = type;
    this.registryUrl = registryUrl;
  }

  T decode(byte[] value) throws IOException, InterruptedException {
    if (value == null || value.length < 5 || value[0] != 0) {
      throw new IOException("it does not begin with a zero byte and a schema id");
    }
    int id = ByteBuffer.wrap(value).getInt(1);
    DatumReader<T> reader = readers.get(id);
    if (reader == null) {
      // Whatever the writer's version, it is resolved against the schema that this program was built with.
      SpecificData model = SpecificData.getForClass(type);
      reader = new SpecificDatumReader<>(writerSchema(id), model.getSchema(type), model);
      readers.put(id, reader);
    }
    try {
      return reader.read(null, DecoderFactory.get().binaryDecoder(value, 5, value.length - 5, null));
    } catch (AvroRuntimeException | IndexOutOfBoundsException | IOException error) {
      throw new IOException("it is not what schema id " + id + " says: " + error, error);
    }
  }

  private Schema writerSchema(int id) throws IOException, InterruptedException {
    URI uri = URI.create(registryUrl + "/schemas/ids/" + Integer.toUnsignedString(id));
    HttpRequest request = HttpRequest.newBuilder(uri).timeout(Duration.ofSeconds(5)).build();
    try {
      var answer = http.send(request, BodyHandlers.ofString());
      if (answer.statusCode() != 200) {
        String known = answer.statusCode() == 404 ? " does not know schema id " + id : " answers HTTP " + answer.statusCode();
        throw new IOException("the registry at " + registryUrl + known);
      }
      return new Schema.Parser().parse(new ObjectMapper().readTree(answer.body()).get("schema").asText());
    } catch (java.net.ConnectException | java.net.http.HttpTimeoutException error) {
      throw new IOException("the registry at " + registryUrl + " does not answer", error);
    } catch (AvroRuntimeException | NullPointerException error) {
      throw new IOException("schema id " + id + " is no Avro schema", error);
    }
  }
}
