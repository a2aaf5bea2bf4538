"""The `datasets` library as an input: saved to disk, a folder of data files, streamed; no hub is reached."""

import json

import pytest

from kdcache.capture.inputs import InputReader
from kdcache.config.capture import InputConfig, ShardConfig
from kdcache.errors import InputError
from kdcache.inputs.content import BEGINNING

datasets = pytest.importorskip("datasets")

TEXTS = ["one", "two", "", "four", "five"]
OUTPUT = ShardConfig(unit_items=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "d"
    columns = {"text": TEXTS, "input_ids": [[1], [2, 3], [], [4], [5]], "kind": ["wiki", None, "code", "code", "wiki"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def data_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


def reader(folder, **fields):
    return InputReader(InputConfig(format="dataset", dataset=str(folder), **fields))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "data_files"])
def test_every_kind_gives_the_rows_from_any_place_on(kind, streaming, request):
    folder = request.getfixturevalue(kind)
    source = reader(folder, streaming=streaming, limit=5)
    items = list(source.items(BEGINNING))
    assert [item.content for item in items] == TEXTS
    assert items[3].source == f"{folder}[train]#3"
    assert [item.content for item in source.items(items[3].start)] == TEXTS[3:]


@pytest.mark.parametrize("streaming", [False, True])
def test_domains_come_with_the_rows(saved, streaming):
    items = reader(saved, streaming=streaming, limit=5, domain_field="kind").items()
    assert [item.domain for item in items] == ["wiki", "", "code", "code", "wiki"]


def test_ids_come_as_arrays(saved):
    assert [item.content.tolist() for item in reader(saved, content="ids").items()] == [[1], [2, 3], [], [4], [5]]


def test_a_stream_that_ends_early_leaves_units_short_or_empty(data_files):
    source = reader(data_files, streaming=True, limit=9)
    plan = source.plan(OUTPUT, template_fingerprint="")
    read = [[item.content for item in source.read(unit)] for unit in plan.units]
    assert read == [["one", "two"], ["", "four"], ["five"], [], []]
    fresh = reader(data_files, streaming=True, limit=9)
    assert [item.content for item in fresh.read(plan.units[1])] == ["", "four"]


def test_a_map_style_dataset_is_planned_by_its_content(saved, data_files):
    plans = [reader(folder).plan(OUTPUT, template_fingerprint="") for folder in (saved, data_files)]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert (plans[0].num_items, plans[0].num_empty_items) == (5, 1)


def test_what_cannot_be_opened_is_named(saved, tmp_path):
    with pytest.raises(InputError, match=r"no split 'test'; it has 'train'"):
        list(reader(saved, split="test").items())
    with pytest.raises(InputError, match=r"no column 'body'; the columns are 'text', 'input_ids'"):
        list(reader(saved, field="body").items())
    with pytest.raises(InputError, match=r"dataset .*nowhere\[train\]: cannot be opened"):
        list(reader(tmp_path / "nowhere").items())
    with pytest.raises(InputError, match=r"dataset nobody/nothing\[train\]: cannot be opened"):
        list(reader("nobody/nothing").items())
