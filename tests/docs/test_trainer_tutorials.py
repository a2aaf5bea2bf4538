"""The tutorials about trainers are run. Of a project that is not installed, a stand-in with its signatures takes the place."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

pytest.importorskip("accelerate")

import torch
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments
from tutorial_runner import Tutorial

from kdcache.errors import ConfigError
from kdcache.train.adapters import KDMixin, KDTrainer

PAGES = Path(__file__).parents[2] / "kdcache" / "docs"
pytestmark = pytest.mark.slow

NUM_STEPS = 4
ON_A_CPU = {
    "max_steps=1000": f"max_steps={NUM_STEPS}, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True",
    "learning_rate=1e-5": "learning_rate=1e-2",
    "seq_len=2048": "seq_len=64",
    "batch_rows=16": "batch_rows=2",
}


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the teacher's tokenizer and other weights."""
    return build_tiny_model(tmp_path_factory.mktemp("student") / "tiny-llama", seed=1)


@pytest.fixture
def instead(student_dir: Path) -> dict[str, str]:
    return ON_A_CPU | {"Qwen/Qwen3-0.6B": str(student_dir)}


def page(name: str) -> Path:
    return PAGES / f"{name}.md"


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def assert_it_learns(trainer: Any) -> None:
    """The loss of every step was logged, and fell."""
    found = losses(trainer)
    assert len(found) == NUM_STEPS
    assert found[-1] < 0.8 * found[0]


def test_transformers_trainer_and_its_resume(with_cache: Path, instead: dict[str, str]) -> None:
    last = "trainer.train(resume_from_checkpoint=True)"
    saved = {last: "first = trainer\ntrainer.train(resume_from_checkpoint='student/checkpoint-2')"}
    names = Tutorial(page("huggingface-trainer"), instead=instead | saved).run()
    assert_it_learns(names["trainer"])
    assert issubclass(names["OurTrainer"], KDMixin)


def test_trl_and_adapters_of_peft(with_cache: Path, instead: dict[str, str]) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    names = Tutorial(page("trl"), instead=instead).run()
    assert len(losses(names["trainer"])) == NUM_STEPS
    assert names["student"].print_trainable_parameters() is None


class FastModel(LlamaForCausalLM):
    """Of Unsloth's causal models, what decides whether a loss can stand in for the logits: without labels the projection is
    called as a module, and what it gives is cast to the dtype of the configuration."""

    def forward(
        self,
        input_ids: Any = None,
        causal_mask: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        assert labels is None
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)[0]
        logits = self.lm_head(hidden.to(self.lm_head.weight.dtype)).to(torch.bfloat16)
        return CausalLMOutputWithPast(logits=logits)


class FastLanguageModel:
    """Unsloth's way to a model."""

    @staticmethod
    def from_pretrained(model_name: str, max_seq_length: int = 2048, load_in_4bit: bool = True) -> tuple[Any, Any]:
        return FastModel.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model: Any, r: int = 16, target_modules: Any = ()) -> Any:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=r, target_modules=target_modules))


def test_unsloths_way_of_making_logits(
    with_cache: Path, instead: dict[str, str], student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    stand_in(monkeypatch, "unsloth", FastLanguageModel=FastLanguageModel)
    names = Tutorial(page("unsloth"), instead=instead).run()
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    plain = KDTrainer(model, arguments("plain"), cache="cache", loader=names["trainer"].stream.loader.config)
    plain.train()
    plain.close()
    assert len(losses(names["trainer"])) == NUM_STEPS
    assert losses(names["trainer"])[0] == pytest.approx(losses(plain)[0], rel=2**-8)  # adapters begin as nothing
    assert all(line["grad_norm"] > 0 for line in names["trainer"].state.log_history if "grad_norm" in line)
    assert (with_cache / "student-lora" / "adapter_config.json").exists()


def test_packed_rows_are_refused_where_a_body_does_not_keep_their_texts_apart(
    with_cache: Path, instead: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    stand_in(monkeypatch, "unsloth", FastLanguageModel=FastLanguageModel)
    forward = LlamaModel.forward

    def causal_alone(
        self: Any, input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None, **others: Any
    ) -> Any:
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(LlamaModel, "forward", causal_alone)
    packed = {'packing="none", pad_to="longest"': 'packing="first_fit"'}
    with pytest.raises(ConfigError, match="pack"):
        Tutorial(page("unsloth"), instead=packed | instead).run()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module under this name, and its packages, for the time of a test."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        whole = ".".join(parts[:end])
        if whole not in sys.modules:
            monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
    for key, value in members.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]


class Seq2SeqTrainer(Trainer):
    """ms-swift's, by its signature: a template it asks for its tokenizer, and a dataset whose length it takes."""

    def __init__(
        self, model: Any, args: Any, template: Any, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any
    ) -> None:
        assert len(train_dataset) == 1
        super().__init__(
            model=model, args=args, data_collator=lambda batch: batch, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=template.tokenizer, **kwargs,
        )  # fmt: skip

    def _prepare_inputs(self, inputs: Any) -> Any:
        return {**super()._prepare_inputs(inputs), "compute_loss_func": None}


class TrainerFactory:
    """ms-swift's table of trainers."""

    TRAINER_MAPPING: ClassVar = {"causal_lm": "swift.trainers.Seq2SeqTrainer"}


def arguments(folder: str) -> TrainingArguments:
    options = {"max_steps": NUM_STEPS, "logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(folder, learning_rate=1e-2, **options)  # pyright: ignore[reportArgumentType]


def test_ms_swifts_table_of_trainers(
    with_cache: Path, instead: dict[str, str], student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "swift.trainers", Seq2SeqTrainer=Seq2SeqTrainer, TrainerFactory=TrainerFactory)
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    Tutorial(page("ms-swift"), instead=instead).run()
    importlib.import_module("kd_swift")
    module, _, name = TrainerFactory.TRAINER_MAPPING["causal_lm"].rpartition(".")
    template = ModuleType("template")
    template.tokenizer = AutoTokenizer.from_pretrained(student_dir)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = getattr(importlib.import_module(module), name)(
        model=AutoModelForCausalLM.from_pretrained(student_dir), args=arguments("out"), template=template,
        train_dataset=[{"input_ids": [0]}], eval_dataset=None,
    )  # fmt: skip
    trainer.train()
    trainer.close()
    assert_it_learns(trainer)


class AxolotlTrainer(Trainer):
    """Axolotl's, by its signature and the arguments that only it takes."""

    def __init__(
        self,
        *_args: Any,
        bench_data_collator: Any = None,
        eval_data_collator: Any = None,
        dataset_tags: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*_args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the loss of labels")


class TrainDatasetMeta:
    def __init__(self, train_dataset: Any, eval_dataset: Any = None, total_num_steps: int | None = None) -> None:
        self.train_dataset, self.total_num_steps = train_dataset, total_num_steps


def test_axolotls_plugin(with_cache: Path, instead: dict[str, str], student_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("datasets")
    stand_in(monkeypatch, "axolotl.common.datasets", TrainDatasetMeta=TrainDatasetMeta)
    stand_in(monkeypatch, "axolotl.core.trainers.base", AxolotlTrainer=AxolotlTrainer)
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    Tutorial(page("axolotl"), instead=instead).run()
    asked = yaml.safe_load(Path("axolotl.yaml").read_text())
    module, _, name = asked["plugins"][0].rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    cfg = ModuleType("cfg")
    cfg.max_steps = asked["max_steps"]  # pyright: ignore[reportAttributeAccessIssue]
    meta = plugin.load_datasets(cfg, preprocess=False)
    assert (len(meta.train_dataset), meta.total_num_steps) == (1, 1000)
    trainer = plugin.get_trainer_cls(cfg)(
        model=AutoModelForCausalLM.from_pretrained(student_dir), train_dataset=meta.train_dataset, eval_dataset=None,
        args=arguments("out"), data_collator=lambda batch: batch, callbacks=[], bench_data_collator=None, dataset_tags=["json"],
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )  # fmt: skip
    trainer.train()
    trainer.close()
    assert_it_learns(trainer)


class CustomSeq2SeqTrainer(Trainer):
    """LlamaFactory's, by its signature: arguments of its own first, the trainer's by name."""

    def __init__(
        self,
        finetuning_args: Any,
        processor: Any,
        model_args: Any = None,
        gen_kwargs: Any = None,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)


def test_llamafactorys_trainer_by_its_name(
    with_cache: Path, instead: dict[str, str], student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = stand_in(monkeypatch, "llamafactory.train.sft.workflow", CustomSeq2SeqTrainer=CustomSeq2SeqTrainer)
    monkeypatch.setattr(sys.modules["llamafactory.train.sft"], "workflow", workflow, raising=False)
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=None)
    Tutorial(page("llamafactory"), instead=instead).run()
    importlib.import_module("train_kd")
    trainer: Any = workflow.CustomSeq2SeqTrainer(
        model=AutoModelForCausalLM.from_pretrained(student_dir), args=arguments("out"), finetuning_args=None, processor=None,
        data_collator=lambda batch: batch, callbacks=[], gen_kwargs={}, ref_model=None, train_dataset=[{}],
        tokenizer=AutoTokenizer.from_pretrained(student_dir),
    )  # fmt: skip
    trainer.train()
    trainer.close()
    assert_it_learns(trainer)
