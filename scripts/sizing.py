"""Print the sizing table of docs/engines.md, computed from measured figures: `python -m scripts.sizing`."""

from __future__ import annotations

__all__ = ["BYTES", "table"]

# The real day: instruments, polls, events.
INSTRUMENTS, POLLS, EVENTS = 548, 98, 19_346
# Bytes on the disk of one broker per record, compressed, with headers. `make test-engines` measures them again.
BYTES = {"trades": 152, "candles": 109, "polls": 441}
# One member of the archive: docs/benchmarks.md.
ROWS_PER_SECOND = 74_887
# The producer's memory in MB, by rows of a poll: `make soak` and docs/benchmarks.md.
MEMORY = ((600, 81), (4_000, 94))
RETENTION_DAYS = 30
DECLARED_PARTITIONS = 6
MARKETS = ((INSTRUMENTS, POLLS), (2_000, 240), (4_000, 240), (50_000, 240))


def _megabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def table() -> str:
    """Return the table, in Markdown."""
    (rows, memory), (more_rows, more_memory) = MEMORY
    slope = (more_memory - memory) / (more_rows - rows)
    lines = [
        "| instruments | polls a day | events a day | trades, 30 days | one member reads in | partitions | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for instruments, polls in MARKETS:
        events = instruments * polls * EVENTS / (INSTRUMENTS * POLLS)
        month = events * RETENTION_DAYS
        # Every instrument may change in one poll: all of it should be read within a second.
        partitions = max(DECLARED_PARTITIONS, -(-instruments // ROWS_PER_SECOND))
        lines.append(
            f"| {instruments:,} | {polls} | {events:,.0f} | {_megabytes(month * BYTES['trades'])} "
            f"| {month / ROWS_PER_SECOND:,.0f} s | {partitions} | {memory + slope * (instruments - rows):.0f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
