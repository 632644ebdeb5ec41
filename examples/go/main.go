// Command bourse-example reads bourse.trades and bourse.candles: a live table, day counts and a digest.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sr"
)

var modulus = new(big.Int).Lsh(big.NewInt(1), 256)

type candle struct {
	Instrument   string `avro:"instrument"`
	Symbol       string `avro:"symbol"`
	LastPrice    *int64 `avro:"last_price"`
	ClosingPrice *int64 `avro:"closing_price"`
	Volume       int64  `avro:"volume"`
	Value        int64  `avro:"value"`
	TradeCount   int64  `avro:"trade_count"`
}

type place struct {
	topic     string
	partition int32
}

type subscriber struct {
	trades, candles *decoder
	table           map[string]candle
	counts          map[string]map[string]int // day, then op
	digest          *big.Int
}

func main() {
	servers := flag.String("bootstrap-servers", "127.0.0.1:9092", "Kafka, host:port")
	registry := flag.String("registry-url", "http://127.0.0.1:8081", "schema registry")
	prefix := flag.String("topic-prefix", "bourse", "what the topics' names begin with")
	schemas := flag.String("schemas", "../../schemas/bourse_schemas/avro", "folder with the .avsc files")
	exitAtEnd := flag.Bool("exit-at-end", false, "stop when all that is there has been read")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *servers, *registry, *prefix, *schemas, *exitAtEnd); err != nil {
		fmt.Fprintln(os.Stderr, "error:", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

func run(ctx context.Context, servers, registryURL, prefix, schemas string, exitAtEnd bool) error {
	registry, err := sr.NewClient(sr.URLs(registryURL))
	if err != nil {
		return err
	}
	s := subscriber{table: map[string]candle{}, counts: map[string]map[string]int{}, digest: new(big.Int)}
	if s.trades, err = newDecoder(registry, schemas, "TradeEvent"); err != nil {
		return err
	}
	if s.candles, err = newDecoder(registry, schemas, "Candle"); err != nil {
		return err
	}
	topics := []string{prefix + ".trades", prefix + ".candles"}
	// No group: every start reads all there is. Control records show how far a transaction's end has been read.
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(servers, ",")...), kgo.ConsumeTopics(topics...),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.KeepControlRecords())
	if err != nil {
		return err
	}
	defer client.Close()
	behind, err := ends(ctx, kadm.NewClient(client), topics)
	if err != nil {
		return fmt.Errorf("Kafka at %s: %w", servers, err)
	}
	for (!exitAtEnd || len(behind) > 0) && ctx.Err() == nil {
		fetches := client.PollFetches(ctx)
		if errs := fetches.Errors(); len(errs) > 0 && ctx.Err() == nil {
			return fmt.Errorf("cannot read %s [%d]: %w", errs[0].Topic, errs[0].Partition, errs[0].Err)
		}
		for record := range fetches.RecordsAll() {
			if err := s.take(ctx, record, record.Topic == topics[0]); err != nil && ctx.Err() == nil {
				return fmt.Errorf("cannot read %s [%d] at %d: %w", record.Topic, record.Partition, record.Offset, err)
			}
			if at := (place{record.Topic, record.Partition}); record.Offset+1 >= behind[at] {
				delete(behind, at)
			}
		}
		if !exitAtEnd && fetches.NumRecords() > 0 {
			s.show()
		}
	}
	s.show()
	return nil
}

// ends returns where what is committed now ends, for the partitions that have anything.
func ends(ctx context.Context, admin *kadm.Client, topics []string) (map[place]int64, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	starts, err := admin.ListStartOffsets(ctx, topics...)
	if err != nil {
		return nil, err
	}
	offsets, err := admin.ListCommittedOffsets(ctx, topics...)
	if err != nil {
		return nil, err
	}
	for _, topic := range topics {
		if first, found := offsets.Lookup(topic, 0); !found || errors.Is(first.Err, kerr.UnknownTopicOrPartition) {
			return nil, fmt.Errorf("topic %s is not there", topic)
		}
	}
	behind := map[place]int64{}
	offsets.Each(func(end kadm.ListedOffset) {
		if start, _ := starts.Lookup(end.Topic, end.Partition); start.Offset < end.Offset {
			behind[place{end.Topic, end.Partition}] = end.Offset
		}
	})
	return behind, errors.Join(starts.Error(), offsets.Error())
}

func (s *subscriber) take(ctx context.Context, record *kgo.Record, isTrade bool) error {
	switch {
	case record.Attrs.IsControl():
		return nil
	case isTrade:
		var trade map[string]any
		if err := s.trades.decode(ctx, record.Value, &trade); err != nil {
			return err
		}
		day, op := trade["trading_day"].(time.Time).Format(time.DateOnly), trade["op"].(string)
		if s.counts[day] == nil {
			s.counts[day] = map[string]int{}
		}
		s.counts[day][op]++
		hash := sha256.Sum256([]byte(canonical(s.trades, trade)))
		s.digest.Add(s.digest, new(big.Int).SetBytes(hash[:])).Mod(s.digest, modulus)
	case record.Value == nil: // a tombstone
		delete(s.table, string(record.Key))
	default:
		var c candle
		if err := s.candles.decode(ctx, record.Value, &c); err != nil {
			return err
		}
		s.table[c.Instrument] = c
	}
	return nil
}
