from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import teacher_model  # noqa: E402
import teacher_tokenizer  # noqa: E402
import train_teacher  # noqa: E402
from teacher_muon import Muon  # noqa: E402
from teacher_replicas import Replicas, single_threads  # noqa: E402

from kdcache import half_precision  # noqa: E402

SMALL = [
    *("--steps", "40", "--hidden-size", "64", "--num-layers", "1", "--vocab-size", "360"),
    *("--seq-len", "32", "--batch-size", "4", "--threads", "1"),
]


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short files that are easy to predict."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        words = " ".join(f"the number {n} follows the number {n - 1}" for n in range(number, number + 40))
        (folder / f"{number}.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def teacher_dir(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher trained for a moment."""
    out = tmp_path_factory.mktemp("out") / "teacher"
    assert train_teacher.main(["--out", str(out), "--text", str(text_dir), *SMALL]) == 0
    return out


def test_a_teacher_loads_as_a_hugging_face_folder_and_has_learned(teacher_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_dir)
    summary = json.loads((teacher_dir / "training.json").read_text())
    assert model.config.vocab_size == len(tokenizer) == 360
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert summary["heldout_nats_per_token"] < math.log(360) - 1
    assert 0 < summary["heldout_nats_per_byte"] < summary["heldout_nats_per_token"]
    assert not teacher_dir.with_name("teacher.partial").exists()


def test_the_reported_loss_is_that_of_the_saved_model(teacher_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_dir)
    lines = (teacher_dir / "text" / "heldout.jsonl").read_text().splitlines()
    ids = teacher_tokenizer.encode_all(tokenizer, [json.loads(line)["text"] for line in lines])
    reported = json.loads((teacher_dir / "training.json").read_text())["heldout_nats_per_token"]
    assert teacher_model.mean_nll(model, ids[: train_teacher.MAX_EVALUATED_TOKENS], 32, 2) == pytest.approx(reported, rel=1e-4)


def test_the_splits_hold_every_document_once(teacher_dir: Path, text_dir: Path) -> None:
    sources = [
        json.loads(line)["source"]
        for name in ("train", "heldback", "heldout")
        for line in (teacher_dir / "text" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert sorted(sources) == sorted(path.name for path in text_dir.iterdir())


def test_the_tokenizer_gives_back_any_text_and_counts_its_bytes(teacher_dir: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_dir)
    text = 'def f(x):\n\treturn "caf\u00e9 \u4f60\U0001f600"\r\n'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert teacher_tokenizer.num_bytes(tokenizer, np.array(ids)) == len(text.encode())


def test_the_chat_template_marks_what_the_assistant_says(teacher_dir: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_dir)
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "two<|im_end|>"
    assert tokenizer.decode(chat["input_ids"]).startswith("<|endoftext|><|im_start|>user\none?<|im_end|>\n")


def test_the_learning_rate_rises_then_falls_to_nothing_by_the_clock() -> None:
    factors = [teacher_model.rate_at(done, 0.1) for done in (0.0, 0.05, 0.1, 0.55, 0.9999)]
    assert factors == pytest.approx([1e-3, 0.5, 0.9, 0.45, 1e-3])


def test_a_pass_reads_each_window_once_in_another_order_than_the_next() -> None:
    recipe = teacher_model.Recipe(vocab_size=400, hidden_size=64, num_layers=1, seq_len=10, seconds=1, batch_size=3)
    batches = teacher_model.draw_batches(torch.arange(200), recipe)
    passes = [torch.cat([next(batches) for _ in range(6)]) for _ in range(2)]
    for rows in passes:
        assert rows.shape == (18, 11)
        assert len(set(rows[:, :10].flatten().tolist())) == 180
        assert (rows.diff(dim=1) == 1).all()
    assert not torch.equal(*passes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", "100"], "--hidden-size is 100, but must be a multiple of 64"),
        (["--seconds", "0"], "--seconds is 0.0, but must be above 0"),
        (["--vocab-size", "256"], "--vocab-size is 256, but must be at least 300"),
        (["--out", "."], "--out . is there already"),
    ],
)
def test_impossible_arguments_end_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_teacher.main(["--out", str(tmp_path / "new"), *arguments])
    assert message in capsys.readouterr().err


def test_too_little_text_ends_with_a_sentence_and_no_teacher(
    text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "new"), "--text", str(text_dir), *SMALL, "--batch-size", "4000"]
    assert train_teacher.main(arguments) == 2
    assert "tokens, but a batch takes 128,033; give more text" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def tiny_model(batch_size: int = 4) -> tuple[Any, teacher_model.Recipe]:
    recipe = teacher_model.Recipe(
        vocab_size=100, hidden_size=64, num_layers=1, seq_len=8, seconds=1, batch_size=batch_size, weight_decay=0.0
    )
    return teacher_model.build_model(recipe, 0), recipe


@pytest.mark.parametrize("num_threads", [2, 3, 6])
def test_replicas_take_the_step_that_one_model_takes(num_threads: int) -> None:
    """Six threads and five sequences: one has nothing to do."""
    ids = torch.randint(0, 100, (5, 9), generator=torch.Generator().manual_seed(0))
    threads_before, results = torch.get_num_threads(), []
    for count in (1, num_threads):
        model, _ = tiny_model()
        # Linear in the gradient: a wrong share of one replica shows.
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
        with single_threads(count) as pool:
            replicas = Replicas(model, pool, count, torch.float32)
            losses = [replicas.step(ids, optimizers, max_norm=1e6) for _ in range(2)]
        results.append((losses, [weight.detach() for weight in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][0][1] < results[0][0][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert torch.get_num_threads() == threads_before


def test_every_weight_has_one_optimizer() -> None:
    model, recipe = tiny_model()
    for num_parts in (1, 2, 50):
        optimizers = teacher_model.make_optimizers(model, recipe, num_parts)
        owned = [id(weight) for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
        assert sorted(owned) == sorted(map(id, model.parameters()))


def test_muon_is_torchs_own_and_runs_in_float32_where_asked() -> None:
    matrices = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((48, 16), (16, 40))]
    recipe = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    makers = (
        torch.optim.Muon,
        lambda weights, **options: Muon(weights, dtype=torch.bfloat16, **options),
        lambda weights, **options: Muon(weights, dtype=torch.float32, **options),
    )
    results = []
    for make in makers:
        weights = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
        optimizer = make(weights, **recipe)
        for step in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append([weight.detach() for weight in weights])
    torchs, halves, singles = results
    torch.testing.assert_close(halves, torchs, rtol=0, atol=0)
    torch.testing.assert_close(singles, torchs, rtol=0, atol=2e-3)
    assert not torch.equal(singles[0], torchs[0])


@pytest.mark.parametrize(("name", "gain", "dtype"), [("auto", 60.0, "float32"), ("auto", 0.4, "bfloat16"),
                                                    ("bfloat16", 60.0, "bfloat16"), ("float32", 0.4, "float32")])  # fmt: skip
def test_products_run_in_what_is_faster_here(name: str, gain: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "float32_gain", lambda _: gain)
    assert train_teacher.choose_dtype(name) == getattr(torch, dtype)


def test_the_same_steps_give_the_same_weights(text_dir: Path, tmp_path: Path) -> None:
    for name in "ab":
        arguments = [*SMALL, "--steps", "3", "--threads", "2", "--dtype", "float32"]
        assert train_teacher.main(["--out", str(tmp_path / name), "--text", str(text_dir), *arguments]) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
