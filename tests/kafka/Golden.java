import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HexFormat;
import java.util.Scanner;
import java.io.ByteArrayOutputStream;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.BinaryDecoder;
import org.apache.avro.io.BinaryEncoder;
import org.apache.avro.io.DecoderFactory;
import org.apache.avro.io.EncoderFactory;

/** Reads lines of "WRITER.avsc READER.avsc HEX"; prints each record as the reader's schema writes it, in hex. */
class Golden {
    public static void main(String[] args) throws Exception {
        Scanner lines = new Scanner(System.in, StandardCharsets.UTF_8);
        while (lines.hasNextLine()) {
            String[] words = lines.nextLine().split(" ");
            Schema writer = new Schema.Parser().parse(Files.readString(Path.of(words[0])));
            Schema reader = new Schema.Parser().parse(Files.readString(Path.of(words[1])));
            BinaryDecoder bytes = DecoderFactory.get().binaryDecoder(HexFormat.of().parseHex(words[2]), null);
            GenericRecord record = new GenericDatumReader<GenericRecord>(writer, reader).read(null, bytes);
            if (!bytes.isEnd()) throw new IllegalStateException("bytes after the record: " + words[1]);
            ByteArrayOutputStream out = new ByteArrayOutputStream();
            BinaryEncoder encoder = EncoderFactory.get().binaryEncoder(out, null);
            new GenericDatumWriter<GenericRecord>(reader).write(record, encoder);
            encoder.flush();
            System.out.println(HexFormat.of().formatHex(out.toByteArray()));
        }
    }
}
