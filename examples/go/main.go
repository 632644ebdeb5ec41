// Command bourse-example reads bourse.trades and bourse.candles: a live table and each day's counts, or JSON.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/twmb/avro"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sr"
)

var (
	servers     = flag.String("bootstrap-servers", "127.0.0.1:9092", "Kafka, host:port")
	registryURL = flag.String("registry-url", "http://127.0.0.1:8081", "schema registry")
	prefix      = flag.String("topic-prefix", "bourse", "what the topics' names begin with")
	schemas     = flag.String("schemas", "../../schemas/bourse_schemas/avro", "folder with the .avsc files")
	exitAtEnd   = flag.Bool("exit-at-end", false, "stop when all that is there has been read")
	asJSON      = flag.Bool("json", false, "print every trade as a line of JSON instead of the table")
	registry    *sr.Client
	resolved    = map[int]*avro.Schema{}      // by schema id, which never changes
	table       = map[string]map[string]any{} // the candles, by instrument
	counts      = map[string]int{}            // the trades, by day and op
)

func main() {
	flag.Parse()
	if err := run(context.Background()); err != nil {
		why := strings.ReplaceAll(err.Error(), "\n", "; ")
		fmt.Fprintf(os.Stderr, "error: %s (Kafka at %s, registry at %s)\n", why, *servers, *registryURL)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	if registry, err = sr.NewClient(sr.URLs(*registryURL)); err != nil {
		return err
	}
	trades, candles := *prefix+".trades", *prefix+".candles"
	// No group: every start reads all there is. Control records show how far a transaction's end has been read.
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(*servers, ",")...), kgo.ConsumeTopics(trades, candles),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.KeepControlRecords(),
		kgo.RetryTimeout(5*time.Second))
	if err != nil {
		return err
	}
	defer client.Close()
	starts, err := kadm.NewClient(client).ListStartOffsets(ctx, trades, candles)
	ends, also := kadm.NewClient(client).ListCommittedOffsets(ctx, trades, candles)
	if err = errors.Join(err, also, starts.Error(), ends.Error()); err != nil {
		return fmt.Errorf("%s and %s: %w", trades, candles, err)
	}
	left := 0 // partitions with something that was not read
	ends.Each(func(end kadm.ListedOffset) {
		if start, _ := starts.Lookup(end.Topic, end.Partition); start.Offset < end.Offset {
			left++
		}
	})
	for !*exitAtEnd || left > 0 {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return err
		}
		for record := range fetches.RecordsAll() {
			if err := take(ctx, record, record.Topic == trades); err != nil {
				return fmt.Errorf("cannot read %s [%d] at %d: %w", record.Topic, record.Partition, record.Offset, err)
			}
			if end, _ := ends.Lookup(record.Topic, record.Partition); record.Offset+1 == end.Offset {
				left--
			}
		}
		if !*asJSON && (!*exitAtEnd || left == 0) {
			show()
		}
	}
	return nil
}

func take(ctx context.Context, record *kgo.Record, isTrade bool) error {
	switch value, err := decode(ctx, record.Value); {
	case record.Attrs.IsControl(): // a transaction's end
	case record.Value == nil && !isTrade: // a tombstone
		delete(table, string(record.Key))
	case err != nil:
		return err
	case !isTrade:
		if isNewer(value, table[string(record.Key)]) {
			table[string(record.Key)] = value
		}
	default:
		counts[fmt.Sprint(value["trading_day"].(time.Time).Format(time.DateOnly), " ", value["op"])]++
		if *asJSON {
			return json.NewEncoder(os.Stdout).Encode(value)
		}
	}
	return nil
}

// isNewer compares candles: a topic that got more partitions has an older candle in the instrument's partition of before.
func isNewer(candle, known map[string]any) bool {
	if known == nil {
		return true
	}
	days := candle["trading_day"].(time.Time).Compare(known["trading_day"].(time.Time))
	return cmp.Or(days, cmp.Compare(candle["sequence"].(int64), known["sequence"].(int64))) > 0
}

// decode reads the wire format: a zero byte, four bytes of schema id, Avro as the schema of that id wrote it.
func decode(ctx context.Context, value []byte) (record map[string]any, err error) {
	id, body, err := new(sr.ConfluentHeader).DecodeID(value)
	if err == nil && resolved[id] == nil {
		resolved[id], err = resolve(ctx, id)
	}
	if err == nil {
		_, err = resolved[id].Decode(body, &record)
	}
	return record, err
}

// resolve returns how records of an id are read as the schema that this program was made for, whatever their version.
func resolve(ctx context.Context, id int) (*avro.Schema, error) {
	found, err := registry.SchemaByID(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("schema id %d: %w", id, err)
	}
	writer, err := avro.Parse(found.Schema)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(*schemas + "/" + writer.Root().Name + ".avsc")
	reader, also := avro.Parse(string(text))
	if err := errors.Join(err, also); err != nil {
		return nil, err
	}
	return avro.Resolve(writer, reader)
}

func show() {
	fmt.Println("symbol\tlast\tclosing\tvolume\tvalue\ttrades")
	rows := slices.SortedFunc(maps.Values(table), func(a, b map[string]any) int {
		return cmp.Compare(b["value"].(int64), a["value"].(int64))
	})
	for _, c := range rows[:min(10, len(rows))] {
		fmt.Printf("%v\t%v\t%v\t%v\t%v\t%v\n", c["symbol"], c["last_price"], c["closing_price"], c["volume"], c["value"], c["trade_count"])
	}
	for _, dayAndOp := range slices.Sorted(maps.Keys(counts)) {
		fmt.Println(dayAndOp, counts[dayAndOp])
	}
}
