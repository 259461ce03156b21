"""Writes fixtures/data/*.parquet: small data sets as the Hub has them.  Needs pyarrow."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).parent / "fixtures" / "data"
TEXTS = [
    f"Story {i}: the caf\u00e9 \u2014 \U0001f600 was {'very ' * (i % 5)}full.\nIt rained." for i in range(50)
]
IDS = [[i * j % 97 for j in range(i % 7 + 1)] for i in range(50)]

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for codec in ("none", "snappy", "gzip", "brotli", "zstd"):
        table = pa.table({"id": range(50), "text": TEXTS})
        pq.write_table(table, OUT / f"text-{codec}.parquet", compression=codec, row_group_size=20)
    ids = {"int32": pa.list_(pa.int32()), "int64": pa.list_(pa.int64())}
    for name, kind in ids.items():
        pq.write_table(
            pa.table({"input_ids": pa.array(IDS, kind)}), OUT / f"ids-{name}.parquet", row_group_size=20
        )
    pq.write_table(pa.table({"story": TEXTS, "topic": ["rain"] * 50}), OUT / "story.parquet")
    pq.write_table(pa.table({"title": TEXTS}), OUT / "no-text.parquet")
