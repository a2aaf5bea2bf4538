"""Layouts in which people keep a teacher's rows: each is read to the same rows as the plain columns of the same truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_cases import Item, K, Truth, defects, items, notes, with_extra_target, write_columns, write_rows

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignSequence, ReadConfig
from kdcache.foreign.formats.detect import open_foreign
from kdcache.foreign.judge.doctor import ExamineConfig, examine
from kdcache.teacher import load_tokenizer

PAD = 7


def read(path: Path, **options: Any) -> list[ForeignSequence]:
    return list(open_foreign(path, ReadConfig(**options)).read())


def assert_same_rows(found: list[ForeignSequence], expected: list[Item], *, first: int = 0) -> None:
    """Ids of the text, positions, ids and values of every row, the rows before `first` left out."""
    assert len(found) == len(expected)
    for sequence, item in zip(found, expected, strict=True):
        assert sequence.input_ids_N is not None
        assert sequence.input_ids_N.tolist() == item.input_ids
        assert sequence.positions_P.tolist() == list(range(first, len(item.ids)))
        offsets = sequence.offsets_P1
        for r, (ids, values) in enumerate(zip(item.ids[first:], item.values[first:], strict=True)):
            row = slice(offsets[r], offsets[r + 1])
            found_row = dict(zip(sequence.token_ids_E[row].tolist(), sequence.values_E[row].tolist(), strict=True))
            assert found_row == pytest.approx(dict(zip(ids, values, strict=True)))


def as_objects(item: Item, id_field: str = "token_id", id_of: Any = int) -> list[list[dict[str, Any]]]:
    rows = zip(item.ids, item.values, strict=True)
    return [[{id_field: id_of(i), "logprob": v} for i, v in zip(ids, values, strict=True)] for ids, values in rows]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("column", ["logprobs", "what_the_teacher_said"])
def test_lists_of_objects_are_ids_and_values_whatever_the_column_s_name(tmp_path: Path, truth: Truth, ending: str, column: str):
    made = items(truth)
    path = write_rows(tmp_path / f"a.{ending}", [{"input_ids": i.input_ids, column: as_objects(i)} for i in made])
    assert_same_rows(read(path), made)
    assert_same_rows(read(path, columns={"entries": column}), made)
    assert defects(examine(path, ExamineConfig())) == {}


def test_axolotl_s_older_lists_are_read_and_are_one_off(tmp_path: Path, truth: Truth):
    made = items(truth)
    rows = [{"input_ids": i.input_ids, "said": as_objects(i, "token", "token_id:{}".format)} for i in made]
    path = write_rows(tmp_path / "a.parquet", rows)
    found = examine(path, ExamineConfig())
    assert (found.title, defects(found)) == ("Axolotl legacy logprob lists (parquet)", {"shifted_positions": "--shift -1"})


def test_entries_that_are_text_are_refused_with_what_to_ask_the_engine_for(tmp_path: Path, truth: Truth):
    path = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2], "said": [[{"token": " the", "logprob": -0.1}]]}])
    with pytest.raises(InputError, match=r"a.jsonl:1: said: the entry's token is ' the', but an id was expected; .*return_tok"):
        read(path)
    path = write_rows(tmp_path / "b.jsonl", [{"input_ids": [1, 2], "said": [[{"token_id": 3, "logprob": None}]]}])
    with pytest.raises(InputError, match="the entry's logprob is None, but a number was expected"):
        read(path)


def test_published_chats_get_their_ids_from_the_named_tokenizer(tmp_path: Path, tiny_model_dir: Path):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    chats = [[{"role": "user", "content": f"Add {n} and 1."}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(4)]
    ids = [tokenizer.encode_chat(chat).input_ids.tolist() for chat in chats]
    rows = [
        {"messages_combined": chat, "logprobs": [[-0.5, -1.0]] * len(N), "target_token_ids": [[3, 4]] * len(N)}
        for chat, N in zip(chats, ids, strict=True)
    ]
    path = write_rows(tmp_path / "a.parquet", rows)
    without = examine(path, ExamineConfig()).findings
    assert [(f.name, "--tokenizer NAME" in f.sentence) for f in without if f.severity == "fatal"] == [("no_tokens", True)]
    found = read(path, tokenizer=tokenizer)
    assert [s.input_ids_N.tolist() for s in found if s.input_ids_N is not None] == ids
    rows[1]["logprobs"].append([-0.5, -1.0])
    rows[1]["target_token_ids"].append([3, 4])
    with pytest.raises(InputError, match=r"#1: \d+ positions, but the tokenizer's chat template makes \d+ tokens of the chat"):
        read(write_rows(tmp_path / "b.parquet", rows), tokenizer=tokenizer)


def vllm_items(item: Item) -> list[dict[str, dict[str, float]] | None]:
    rows = zip(item.ids, item.values, strict=True)
    return [None] + [{str(i): {"logprob": v, "rank": 1} for i, v in zip(ids, vs, strict=True)} for ids, vs in rows]


def vllm_native(item: Item) -> dict[str, Any]:
    return {"prompt_token_ids": item.input_ids, "prompt_logprobs": vllm_items(item)}


def vllm_choice(item: Item) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "text": "", "logprobs": None, **vllm_native(item)}]}


def sglang(item: Item) -> dict[str, Any]:
    rows = zip(item.ids, item.values, strict=True)
    top = [None] + [[[v, i, None] for i, v in zip(ids, vs, strict=True)] for ids, vs in rows]
    own = [[None if not n else -1.0, token, None] for n, token in enumerate(item.input_ids)]
    return {"text": "", "meta_info": {"input_top_logprobs": top, "input_token_logprobs": own, "prompt_tokens": len(own)}}


def echoed(item: Item) -> dict[str, Any]:
    rows = zip(item.ids, item.values, strict=True)
    top = [None] + [{f"token_id:{i}": v for i, v in zip(ids, vs, strict=True)} for ids, vs in rows]
    tokens = [f"token_id:{i}" for i in item.input_ids]
    logprobs = {"tokens": tokens, "token_logprobs": [None] + [-1.0] * (len(tokens) - 1), "top_logprobs": top}
    return {"object": "text_completion", "choices": [{"logprobs": logprobs}]}


SHAPES = {"vllm": vllm_native, "vllm choice": vllm_choice, "sglang": sglang, "echoed completion": echoed}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_about_a_prompt_are_its_rows(tmp_path: Path, truth: Truth, shape: str):
    made = items(truth)
    path = write_rows(tmp_path / "a.jsonl", [SHAPES[shape](item) for item in made])
    assert_same_rows(read(path), made)
    # A tokenizer must be named to convert: ids that JSON has written as text are no tokens' text for it, "7" least of all.
    assert_same_rows(read(path, tokenizer=load_tokenizer(str(truth.model))), made)
    assert defects(examine(path, ExamineConfig())) == {}


def test_vllm_adds_the_text_s_token_and_the_doctor_knows(tmp_path: Path, truth: Truth):
    path = write_rows(tmp_path / "a.jsonl", [vllm_native(item) for item in with_extra_target(truth)])
    assert defects(examine(path, ExamineConfig())) == {"k_plus_1_entries": "--repair k+1"}


def written_vllm(item: Item, start: int) -> dict[str, Any]:
    return {"outputs": [{"token_ids": item.input_ids[start:], "logprobs": vllm_items(item)[start:]}]}


def written_sglang(item: Item, start: int) -> dict[str, Any]:
    about = sglang(item)["meta_info"]
    return {"meta_info": {f"output_{n}_logprobs": about[f"input_{n}_logprobs"][start:] for n in ("top", "token")}}


def written_chat(item: Item, start: int) -> dict[str, Any]:
    rows = as_objects(item, "token", "token_id:{}".format)[start - 1 :]
    tokens = [f"token_id:{i}" for i in item.input_ids[start:]]
    content = [{"token": t, "logprob": -1.0, "top_logprobs": r} for t, r in zip(tokens, rows, strict=True)]
    return {"choices": [{"logprobs": {"content": content}}]}


@pytest.mark.parametrize("written", [written_vllm, written_sglang, written_chat])
def test_answers_that_an_engine_wrote_follow_their_prompt(tmp_path: Path, truth: Truth, written: Any):
    made, start = items(truth), 9
    rows = [{"prompt_token_ids": item.input_ids[:start]} | written(item, start) for item in made]
    assert_same_rows(read(write_rows(tmp_path / "a.jsonl", rows)), made, first=start - 1)
    without = write_rows(tmp_path / "b.jsonl", [written(item, start) for item in made])
    assert "no_tokens" in defects(examine(without, ExamineConfig()))


def test_text_of_tokens_becomes_ids_where_the_tokenizer_tells_them_apart(tmp_path: Path, tiny_model_dir: Path):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    chat = [{"role": "user", "content": "Say def."}]
    prompt, answer = tokenizer.encode_prompt(chat).input_ids.tolist(), tokenizer.encode("def return", add_special_tokens=False)
    content = [
        {"token": tokenizer.decode([t]), "top_logprobs": [{"token": tokenizer.decode([t]), "logprob": -0.25}]} for t in answer
    ]
    rows = [{"messages": chat, "response": {"body": {"choices": [{"logprobs": {"content": content}}]}}}]
    (found,) = read(write_rows(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)
    assert found.input_ids_N is not None
    assert found.input_ids_N.tolist() == prompt + answer
    assert found.positions_P.tolist() == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    assert found.token_ids_E.tolist() == answer
    content[0]["token"] = "\ufffd"
    with pytest.raises(InputError, match="is the text of several tokens of this tokenizer, so its id cannot be known"):
        read(write_rows(tmp_path / "b.jsonl", rows), tokenizer=tokenizer)


def test_the_prompt_s_rows_and_the_answer_s_are_both_kept(tmp_path: Path, truth: Truth):
    made, start = items(truth), 9
    for name, shape in {"native": {}, "choice": {"object": "chat.completion"}}.items():
        rows = []
        for item in made:
            asked = {"prompt_token_ids": item.input_ids[:start], "prompt_logprobs": vllm_items(item)[:start]}
            rows.append(shape | asked | (written_vllm if name == "native" else written_chat)(item, start))
        found = read(write_rows(tmp_path / f"{name}.jsonl", rows))
        prompts, written = found[::2], found[1::2]
        assert_same_rows(prompts, [Item(i.input_ids[:start], i.ids[: start - 1], i.values[: start - 1]) for i in made])
        assert_same_rows(written, made, first=start - 1)


def test_an_echo_is_read_where_prompt_logprobs_have_no_ids_beside_them(tmp_path: Path, truth: Truth):
    made = items(truth)
    rows = []
    for item in made:
        (choice,) = echoed(item)["choices"]
        rows.append({"choices": [choice | {"prompt_logprobs": vllm_items(item), "prompt_token_ids": None}]})
    assert_same_rows(read(write_rows(tmp_path / "a.jsonl", rows)), made)


def test_sglang_s_rows_from_a_later_token_on_stand_where_they_belong(tmp_path: Path, truth: Truth):
    made, start = items(truth), 9
    rows = []
    for item in made:
        row = sglang(item)
        about = row["meta_info"]
        about["input_top_logprobs"] = [None, *about["input_top_logprobs"][start + 1 :]]
        about["input_token_logprobs"] = about["input_token_logprobs"][start:]
        rows.append(row)
    (finding,) = [f for f in examine(write_rows(tmp_path / "a.jsonl", rows), ExamineConfig()).findings if f.severity == "fatal"]
    assert (finding.name, "the first 9 are missing (logprob_start_len)" in finding.sentence) == ("no_tokens", True)
    rows = [{"input_ids": item.input_ids} | row for item, row in zip(made, rows, strict=True)]
    for sequence, item in zip(read(write_rows(tmp_path / "b.jsonl", rows)), made, strict=True):
        assert sequence.positions_P.tolist() == list(range(start - 1, len(item.ids)))
        assert sequence.counts_P.tolist() == [0] + [K] * (len(item.ids) - start)
        assert sequence.token_ids_E.tolist() == [token for row in item.ids[start:] for token in row]


def tgi(item: Item, start: int) -> dict[str, Any]:
    tops = [[{"id": i, "logprob": v} for i, v in zip(*row, strict=True)] for row in zip(item.ids, item.values, strict=True)]
    tokens = [{"id": token, "text": "x", "logprob": -1.0} for token in item.input_ids]
    return {"details": {"prefill": tokens[:start], "tokens": tokens[start:], "top_tokens": tops[start - 1 :]}}


def llama_cpp(item: Item, start: int) -> dict[str, Any]:
    parts = tgi(item, start)["details"]
    steps = [{"id": token["id"], "top_logprobs": top} for token, top in zip(parts["tokens"], parts["top_tokens"], strict=True)]
    return {"prompt_token_ids": item.input_ids[:start], "completion_probabilities": steps}


@pytest.mark.parametrize("shape", [tgi, llama_cpp])
def test_answers_of_other_servers(tmp_path: Path, truth: Truth, shape: Any):
    made = items(truth)
    assert_same_rows(read(write_rows(tmp_path / "a.jsonl", [shape(item, 9) for item in made])), made, first=8)


def test_an_error_among_answers_is_counted(tmp_path: Path, truth: Truth):
    rows = [{"response": {"body": vllm_choice(item)}} for item in items(truth)]
    rows[3] = {"response": None, "error": {"message": "too long"}}
    examination = examine(write_rows(tmp_path / "a.jsonl", rows), ExamineConfig())
    assert notes(examination) == {"sequences_without_positions"}
    assert examination.counts.num_sequences == len(rows)


@pytest.mark.parametrize(
    ("ids", "said"), [("abc", "the prompt's token ids are 'abc'"), ([5, None], "the entry's token is None")]
)
def test_a_prompt_that_is_no_list_of_ids_is_refused(tmp_path: Path, truth: Truth, ids: Any, said: str):
    row = vllm_native(items(truth)[0]) | {"prompt_token_ids": ids}
    with pytest.raises(InputError, match=said):
        read(write_rows(tmp_path / "a.jsonl", [row]))


def test_prompt_logprobs_as_arrow_s_maps(tmp_path: Path, truth: Truth):
    made = items(truth)
    kind = pa.list_(pa.map_(pa.string(), pa.struct([("logprob", pa.float64()), ("rank", pa.int64())])))
    cells = [[None if cell is None else list(cell.items()) for cell in vllm_items(item)] for item in made]
    table = pa.table({"prompt_token_ids": [i.input_ids for i in made], "prompt_logprobs": pa.array(cells, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert_same_rows(read(tmp_path / "a.parquet"), made)


def test_rows_of_the_text_s_token_alone_are_no_top_1(tmp_path: Path, truth: Truth):
    made = items(truth)
    for item, logprobs_NV in zip(made, truth.logprobs_SNV, strict=True):
        item.ids = [[token] for token in item.input_ids[1:]]
        item.values = [[float(logprobs_NV[t, token])] for t, (token,) in enumerate(item.ids)]
    path = write_rows(tmp_path / "a.jsonl", [vllm_native(item) for item in made])
    assert "targets_alone" in defects(examine(path, ExamineConfig(vocab_size=520)))
    assert defects(examine(write_columns(tmp_path / "b.parquet", items(truth, 1)), ExamineConfig(vocab_size=520))) == {}


def padded(item: Item, left: int, right: int) -> dict[str, Any]:
    k = len(item.ids[0])
    ids, values = [[PAD] * k], [[-1e9] * k]
    return {
        "input_ids": [PAD] * left + item.input_ids + [PAD] * right,
        "attention_mask": [0] * left + [1] * len(item.input_ids) + [0] * right,
        "topk_ids": ids * left + item.ids + item.ids[-1:] + ids * right,
        "topk_logprobs": values * left + item.values + item.values[-1:] + values * right,
    }


def test_attention_mask_takes_padding_off_both_ends(tmp_path: Path, truth: Truth):
    made = items(truth)
    path = write_rows(tmp_path / "a.parquet", [padded(item, n, 3 * (n % 2)) for n, item in enumerate(made)])
    for n, (sequence, item) in enumerate(zip(read(path), made, strict=True)):
        assert sequence.input_ids_N is not None
        assert sequence.input_ids_N.tolist() == item.input_ids, n
        assert sequence.positions_P.tolist() == list(range(len(item.ids) + 1))  # the last one has no target
        assert sequence.token_ids_E.reshape(-1, K).tolist() == [*item.ids, item.ids[-1]]
    assert defects(examine(path, ExamineConfig())) == {}


def test_rows_of_the_text_alone_beside_padded_tokens_start_where_the_text_does(tmp_path: Path, truth: Truth):
    made = items(truth)
    rows = [padded(item, 5, 2) | {"topk_ids": item.ids, "topk_logprobs": item.values} for item in made]
    assert_same_rows(read(write_rows(tmp_path / "a.parquet", rows)), made)


def test_a_mask_with_holes_or_of_another_length_is_refused(tmp_path: Path, truth: Truth):
    row = padded(items(truth)[0], 2, 0)
    row["attention_mask"][10:12] = [0, 0]
    with pytest.raises(InputError, match=r"a.parquet#0: attention_mask has 2 zeros between its ones"):
        read(write_rows(tmp_path / "a.parquet", [row]))
    with pytest.raises(InputError, match=r"3 values of attention_mask for 66 tokens"):
        read(write_rows(tmp_path / "b.parquet", [row | {"attention_mask": [1, 1, 1]}]))


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl"])
def test_a_second_file_with_other_columns_is_refused_and_never_left_out(tmp_path: Path, truth: Truth, ending: str):
    made = items(truth)
    write_columns(tmp_path / f"a.{ending}", made[:4])
    write_columns(tmp_path / f"b.{ending}", made[4:], ids="teacher_topk_ids")
    with pytest.raises(InputError, match=rf"b.{ending}: has no column 'topk_ids', which a.{ending} has"):
        read(tmp_path)


def test_a_column_that_nothing_needs_may_be_in_one_file_alone(tmp_path: Path, truth: Truth):
    made = items(truth)
    write_columns(tmp_path / "a.jsonl", made[:4])
    rows = [{"note": [{"x": 1}], "input_ids": i.input_ids, "topk_ids": i.ids, "topk_logprobs": i.values} for i in made[4:]]
    write_rows(tmp_path / "b.jsonl", rows)
    assert_same_rows(read(tmp_path), made)


def test_a_mask_in_the_second_file_alone_is_refused_too(tmp_path: Path, truth: Truth):
    made = items(truth)
    write_columns(tmp_path / "a.parquet", made[:4])
    write_rows(tmp_path / "b.parquet", [padded(item, 1, 0) for item in made[4:]])
    with pytest.raises(InputError, match=r"a.parquet: has no column 'attention_mask', which b.parquet has"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_json_lines_are_read_compressed_and_as_an_array(tmp_path: Path, truth: Truth, name: str):
    made = items(truth)
    data = write_columns(tmp_path / "plain.jsonl", made).read_bytes()
    if name == "a.json":
        (tmp_path / name).write_bytes(b"[" + b",".join(data.splitlines()) + b"]")
    else:
        with pa.CompressedOutputStream(str(tmp_path / name), "gzip" if name.endswith("gz") else "zstd") as out:
            out.write(data)
    assert_same_rows(read(tmp_path / name), made)
    (tmp_path / "plain.jsonl").unlink()
    assert_same_rows(read(tmp_path), made)


def test_what_a_folder_holds_beside_is_named(tmp_path: Path, truth: Truth):
    write_columns(tmp_path / "a.jsonl", items(truth))
    (tmp_path / "a.npz").write_bytes(b"x")
    assert examine(tmp_path, ExamineConfig()).facts["not read"] == "1 files: a.npz"


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path):
    ids = pa.array([[1, 2]])
    pq.write_table(pa.table([ids, ids], names=["input_ids", "input_ids"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has two columns 'input_ids'; which of them is meant cannot be told"):
        read(tmp_path / "a.parquet")


def test_what_is_no_answer_is_still_told_how_to_name_its_columns(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"choices": [{"text": "x"}], "prompt": "y"}) + "\n")
    with pytest.raises(InputError, match="is known to hold ids and values of a teacher"):
        read(tmp_path / "a.jsonl")
