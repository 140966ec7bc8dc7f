"""What LongBench's sets share: where a set's file lies and how its rows read. Knows no set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.records import Record, Recorded, longbench_record


class LongBench(Recorded):
    """A set, named like its file."""

    group = "longbench"

    def records(self, data: Path | None) -> Iterator[Record]:
        file = f"{self.name.removeprefix('longbench.')}.jsonl"
        places = (f"longbench/{file}", f"LongBench/{file}", f"LongBench/data/{file}")
        path = local.find(data, *places, get=f"LongBench v1's {file} (THUDM/LongBench, data.zip)")
        for number, row in enumerate(local.rows(path)):
            yield longbench_record(row, number)
