#!/usr/bin/env bash
# Shows partition, offset, key, headers and size of every record that is there, and values where kcat has Avro.
# kcat.sh [TOPIC [HOST:PORT [REGISTRY_URL]]]
set -euo pipefail
topic=${1:-bourse.trades} servers=${2:-127.0.0.1:9092} registry=${3:-http://127.0.0.1:8081}

fail() {
  echo "error: $1" >&2
  exit 1
}

command -v kcat >/dev/null || fail "kcat is not installed"
listed=$(kcat -b "$servers" -L -t "$topic" -m 5 2>/dev/null) || fail "Kafka at $servers does not answer"
grep -q "\"$topic\" with [1-9]" <<<"$listed" || fail "topic $topic not found at $servers"

values=() format='%p %o %k %h %S bytes\n'
if kcat -V | grep -qi avro; then
  values=(-s value=avro -r "$registry") format='%p %o %k %h %s\n'
fi
exec kcat -b "$servers" -C -t "$topic" -X isolation.level=read_committed -o beginning -e -q "${values[@]}" -f "$format"
