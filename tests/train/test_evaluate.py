import json
from pathlib import Path

import pytest
from train_caches import train_config
from transformers import AutoModelForCausalLM

from kdcache.errors import CacheNotFoundError, ConfigError
from kdcache.train.evaluation.evaluate import EvaluateConfig, evaluate
from kdcache.train.trainer import train


@pytest.fixture(scope="module")
def run(small_cache: Path, tiny_model_dir: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "kd"
    measured = {"data": str(heldout), "every_steps": 4, "window": 32}
    train(train_config(small_cache, tiny_model_dir, out, heldout=measured), show_progress=False)
    return out


def _options(run: Path, teacher: Path, heldout: Path, out: Path, **changes: object) -> EvaluateConfig:
    settings = {"students": {"kd": str(run), "copy": str(teacher)}, "window": 32} | changes
    return EvaluateConfig(teacher=str(teacher), data=str(heldout), out=str(out), **settings)  # pyright: ignore[reportArgumentType]


def test_runs_and_model_folders_are_measured_on_the_same_tokens(
    run: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path
) -> None:
    evaluation = evaluate(_options(run, tiny_model_dir, heldout, tmp_path / "out"))
    results = evaluation.results
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["models"]["copy"]["kl"]["value"] == 0
    assert results["models"]["copy"]["nats_per_token"] == results["models"]["teacher"]["nats_per_token"]
    assert results["gap_closed"]["copy"] == {
        metric: {"value": 1.0, "low": 1.0, "high": 1.0} for metric in ("nats_per_token", "kl", "top1_agreement")
    }
    assert results["models"]["kd"]["kl"]["value"] > 0.5
    # Of the cache that the run names; a copy of the teacher keeps all of it.
    assert results["inputs"]["unigram"]["source"] == json.loads((run / "run.json").read_text())["config"]["cache"]
    assert results["retention"]["copy"]["nats_over_unigram"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert results["sizes"]["copy"] == results["sizes"]["teacher"]
    assert results["bootstrap"]["resampled"] == "texts"


def test_the_curve_is_the_runs_own_and_ends_at_the_loss_that_is_measured_again(
    run: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path
) -> None:
    evaluation = evaluate(_options(run, tiny_model_dir, heldout, tmp_path))
    assert [tokens for tokens, _ in evaluation.curves["kd"]] == sorted(tokens for tokens, _ in evaluation.curves["kd"])
    assert evaluation.curves["kd"][-1][1] == pytest.approx(
        evaluation.results["models"]["kd"]["nats_per_token"]["value"], rel=1e-6
    )
    assert evaluation.curves["copy"] == []


def test_without_a_runs_cache_the_rest_is_evaluated_and_a_named_unigram_must_be_there(
    run: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path
) -> None:
    options = _options(run, tiny_model_dir, heldout, tmp_path / "out", students={"copy": str(tiny_model_dir)})
    results = evaluate(options).results
    assert results["inputs"]["unigram"] == {"missing": "no student is a training run that names its cache"}
    assert results["retention"]["copy"]["nats_over_unigram"] is None
    with pytest.raises(CacheNotFoundError):
        evaluate(_options(run, tiny_model_dir, heldout, tmp_path / "out", unigram=str(tmp_path / "gone")))
    results = evaluate(_options(run, tiny_model_dir, heldout, tmp_path / "out", unigram=str(heldout))).results
    assert results["inputs"]["unigram"]["source"] == str(heldout)
    assert results["retention"]["copy"]["nats_over_unigram"]["value"] == 1.0


def test_progress_adds_up_to_what_was_announced(run: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path) -> None:
    announced, advanced = [], []

    def on_start(num_tokens: int):
        announced.append(num_tokens)
        return advanced.append

    options = _options(run, tiny_model_dir, heldout, tmp_path, max_tokens=100)
    results = evaluate(options, on_start=on_start).results
    assert results["num_tokens"] == announced[0] == sum(advanced)
    assert announced[0] < 100


def test_an_unfinished_run_a_missing_model_and_bad_names_are_said(
    run: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    for students, message in (
        ({"kd": str(tmp_path / "unfinished")}, "is a training run that is not finished"),
        ({"kd": str(tmp_path / "nowhere")}, "--student kd: no model can be loaded"),
        ({"teacher": str(run)}, "none named 'teacher'"),
        ({}, "students are missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(_options(run, tiny_model_dir, heldout, tmp_path / "out", students=students))
    with pytest.raises(ConfigError, match="the baseline is 'x'"):
        evaluate(_options(run, tiny_model_dir, heldout, tmp_path / "out", baseline="x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made a directory"):
        evaluate(_options(run, tiny_model_dir, heldout, tmp_path / "file"))


def test_weights_that_do_not_fit_are_refused_and_not_filled_with_noise(
    tiny_model_dir: Path, heldout: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path / "broken")
    fields = json.loads((tmp_path / "broken" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "broken" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"do not fit their configuration: model\.layers\.2"):
        evaluate(_options(tmp_path, tiny_model_dir, heldout, tmp_path / "out", students={"a": str(tmp_path / "broken")}))
