package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/twmb/avro"
	"github.com/twmb/franz-go/pkg/sr"
)

// A decoder reads the wire format: a zero byte, four bytes of schema id, Avro as the schema of that id wrote it.
// Whatever the writer's version, it is resolved against the schema that this program was made for.
type decoder struct {
	registry *sr.Client
	reader   *avro.Schema
	resolved map[int]*avro.Schema // an id's schema never changes
}

func newDecoder(registry *sr.Client, folder, record string) (*decoder, error) {
	text, err := os.ReadFile(filepath.Join(folder, record+".avsc"))
	if err != nil {
		return nil, err
	}
	reader, err := avro.Parse(string(text))
	return &decoder{registry, reader, map[int]*avro.Schema{}}, err
}

func (d *decoder) decode(ctx context.Context, value []byte, into any) error {
	var header sr.ConfluentHeader
	id, body, err := header.DecodeID(value)
	if err != nil {
		return errors.New("it does not begin with a zero byte and a schema id")
	}
	schema, known := d.resolved[id]
	if !known {
		found, err := d.registry.SchemaByID(ctx, id)
		var answer *sr.ResponseError
		if errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound {
			return fmt.Errorf("the registry does not know schema id %d", id)
		} else if err != nil {
			return fmt.Errorf("the registry fails: %w", err)
		}
		writer, err := avro.Parse(found.Schema)
		if err != nil {
			return fmt.Errorf("schema id %d is no Avro schema: %w", id, err)
		}
		if schema, err = avro.Resolve(writer, d.reader); err != nil {
			return fmt.Errorf("schema id %d is of another kind: %w", id, err)
		}
		d.resolved[id] = schema
	}
	rest, err := schema.Decode(body, into, avro.SkipUnknown())
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes are left over", len(rest))
	}
	if err != nil {
		return fmt.Errorf("it is not what schema id %d says: %w", id, err)
	}
	return nil
}
