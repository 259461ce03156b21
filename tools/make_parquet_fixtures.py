"""Writes fixtures/data/: small data sets as the Hub has them.  Needs pyarrow."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).parent / "fixtures" / "data"
TEXTS = [
    f"Story {i}: the caf\u00e9 \u2014 \U0001f600 was {'very ' * (i % 5)}full.\nIt rained." for i in range(50)
]
# as odd.jsonl has them, which is written beside: rows that are nothing, and line ends of other systems
ODD = ["one", None, "", "two\r\nlines", " \n", "<|endoftext|>", "old\rmac", "three <|endoftext|>"]
BOTH = [
    {"text": "not these", "input_ids": [0, 1, 2, 3], "attention_mask": [0, 1, 1, 0]},
    {"text": "nor these", "input_ids": None, "attention_mask": None},
    {"text": "or those", "input_ids": [4, 5], "attention_mask": [0, 0]},
    {"text": "", "input_ids": [6, 7, 7, 7], "attention_mask": None},
]
PADDED = [
    {"input_ids": [5, 6, 7, 9, 9], "labels": [-100, -100, 7, -100, -100]},
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]},
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
    for name, rows in {"odd": [{"text": text} for text in ODD], "both": BOTH, "padded": PADDED}.items():
        pq.write_table(pa.Table.from_pylist(rows), OUT / f"{name}.parquet")
        (OUT / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "struct": [{"raw": "a", "lang": "en"}],
        "list": [["a", "b"]],
        "messages": [[{"role": "user", "content": "a"}]],
        "number": [5],
    }
    for name, text in words.items():
        pq.write_table(pa.table({"text": text}), OUT / f"text-{name}.parquet")
    pq.write_table(pa.table({"input_ids": [[1.5, 2.0]]}), OUT / "ids-double.parquet")
    pq.write_table(pa.table({"input_ids": [3, 4]}), OUT / "ids-flat.parquet")
    pq.write_table(pa.table({"input_ids": [[3, None]]}), OUT / "ids-null.parquet")
    pq.write_table(pa.table({"text": TEXTS}), OUT / "text-lz4.parquet", compression="lz4")
