package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// canonical writes a record's fields in the form of ../README.md.
func canonical(d *decoder, record map[string]any) string {
	var columns []string
	for _, field := range d.reader.Root().Fields {
		switch value := record[field.Name].(type) {
		case nil:
			columns = append(columns, "null")
		case string:
			columns = append(columns, `"`+value+`"`)
		case float64:
			columns = append(columns, fmt.Sprintf("%016x", math.Float64bits(value)))
		case time.Time:
			number := value.UnixMilli()
			if field.Type.LogicalType == "date" {
				number /= 24 * 60 * 60 * 1000
			}
			columns = append(columns, fmt.Sprint(number))
		default:
			columns = append(columns, fmt.Sprint(value))
		}
	}
	return strings.Join(columns, "\t")
}

func (s *subscriber) show() {
	fmt.Println("symbol\tlast\tclosing\tvolume\tvalue\ttrades")
	rows := slices.SortedFunc(maps.Values(s.table), func(a, b candle) int {
		return cmp.Or(cmp.Compare(b.Value, a.Value), cmp.Compare(a.Instrument, b.Instrument))
	})
	for _, c := range rows[:min(10, len(rows))] {
		fmt.Printf("%s\t%s\t%s\t%d\t%d\t%d\n", c.Symbol, price(c.LastPrice), price(c.ClosingPrice), c.Volume, c.Value, c.TradeCount)
	}
	trades := 0
	for _, day := range slices.Sorted(maps.Keys(s.counts)) {
		total := 0
		fmt.Print(day)
		for _, op := range []string{"OPENED", "TRADED", "REVISED", "CANCELLED", "UNKNOWN"} {
			fmt.Printf(" %s=%d", op, s.counts[day][op])
			total += s.counts[day][op]
		}
		fmt.Printf(" total=%d\n", total)
		trades += total
	}
	fmt.Printf("candles=%d trades=%d digest=%064x\n", len(s.table), trades, s.digest)
}

func price(rial *int64) string {
	if rial == nil {
		return "-"
	}
	return fmt.Sprint(*rial)
}
