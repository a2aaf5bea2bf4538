from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contracts import inputs as contract
from contracts.inputs import InputCase

from kdcache import extensions


def write_arrow(path, texts):
    table = pa.table({"text": texts})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


CASES = [
    InputCase("txt", ".txt", lambda path, texts: path.write_text(texts[0]), b"\xff\xfe", one_item=True),
    InputCase("lines", ".txt", lambda path, texts: path.write_text("\n".join(texts) + "\n"), b"\xff\xfe"),
    InputCase("jsonl", ".jsonl", lambda path, texts: path.write_text("\n".join(json.dumps({"text": t}) for t in texts)), b"{]"),
    InputCase("parquet", ".parquet", lambda path, texts: pq.write_table(pa.table({"text": texts}), path), b"PAR1"),
    InputCase("arrow", ".arrow", write_arrow, b"ARROW1"),
]


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_format_keeps_its_promises(case, promise, tmp_path):
    promise(case, tmp_path)


def test_every_format_of_files_is_tried():
    assert {case.name for case in CASES} == extensions.OWN["inputs"].keys() - {"dataset"}
