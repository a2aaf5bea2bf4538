"""A tiny teacher's text and rows, and foreign caches made of them: sound ones, and each with one thing spoiled.

Shape letters: S sequences, N tokens, K entries, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.foreign.formats.distillkit_codec import Config, polynomial_basis

if TYPE_CHECKING:
    from kdcache.foreign.judge.doctor import Examination

K = 16
NUM_SEQUENCES, NUM_TOKENS = 8, 64


@dataclass(frozen=True)
class Truth:
    """Text that a teacher wrote at temperature 1, and its logits at every position.

    Attributes:
        model: the teacher's folder.
        ids_SN: the text.
        logits_SNV: float64; logits_SNV[s, t] is for token t+1.
    """

    model: Path
    ids_SN: NDArray[np.int64]
    logits_SNV: NDArray[np.float64]

    @property
    def logprobs_SNV(self) -> NDArray[np.float64]:
        return log_softmax(self.logits_SNV)


def write_truth(model: Path) -> Truth:
    """Let a tiny model write: so the right alignment has the least NLL, as for any teacher and text it finds likely."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(model).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 500, (NUM_SEQUENCES, 1), generator=generator)
    with torch.inference_mode():
        while ids.shape[1] < NUM_TOKENS:
            last = teacher(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(last, 1, generator=generator)], dim=1)
        logits = teacher(input_ids=ids, use_cache=False).logits
    return Truth(model, ids.numpy(), logits.double().numpy())


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@dataclass
class Item:
    """A foreign row before it is written: lists that a test may spoil."""

    input_ids: list[int]
    ids: list[list[int]]
    values: list[list[float]]


def items(truth: Truth, k: int = K, *, dtype: Any = np.float32) -> list[Item]:
    """Row t is position t, sorted, for every position that has a target."""
    made = []
    for ids_N, logprobs_NV in zip(truth.ids_SN, truth.logprobs_SNV, strict=True):
        top_NK = np.argsort(-logprobs_NV, axis=1, kind="stable")[:-1, :k]
        values_NK = np.take_along_axis(logprobs_NV[:-1], top_NK, axis=1).astype(dtype)
        made.append(Item(ids_N.tolist(), top_NK.tolist(), values_NK.astype(np.float64).tolist()))
    return made


def few_rows(truth: Truth) -> list[Item]:
    """A text too short for anything to be told from it."""
    (first, *_) = items(truth)
    return [Item(first.input_ids[:20], first.ids[:19], first.values[:19])]


def write_columns(path: Path, made: list[Item], **names: str) -> Path:
    """The items under plain column names, as the ending says: .parquet, .arrow or .jsonl."""
    keys = {"tokens": "input_ids", "ids": "topk_ids", "values": "topk_logprobs"} | names
    rows = [{keys["tokens"]: i.input_ids, keys["ids"]: i.ids, keys["values"]: i.values} for i in made]
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the path's ending says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


def changed(made: list[Item], change: Callable[[Item], None]) -> list[Item]:
    """The items after a change to each of them."""
    for item in made:
        change(item)
    return made


def with_extra_target(truth: Truth) -> list[Item]:
    """As vLLM gives prompt logprobs: the text's own token is added where it is not among the top k."""
    made = items(truth)
    for item, logprobs_NV in zip(made, truth.logprobs_SNV, strict=True):
        for t, target in enumerate(item.input_ids[1:]):
            if target not in item.ids[t]:
                item.ids[t].append(target)
                item.values[t].append(float(np.float32(logprobs_NV[t, target])))
    return made


def write_distillkit(folder: Path, made: list[Item], settings: dict[str, Any], **said: Any) -> Path:
    """The items as DistillKit compresses them with these settings, beside a config that says so, but for what is `said`."""
    config = Config(**settings)
    rows = [
        {"input_ids": item.input_ids, "compressed_logprobs": _packed_values(np.array(item.values), config),
         "bytepacked_indices": _packed_ids(np.array(item.ids), config)}
        for item in made
    ]  # fmt: skip
    folder.mkdir()
    (folder / "compression_config.yaml").write_text("# rows: *all*\n" + json.dumps(settings | said))
    write_rows(folder / "data_0.parquet", rows)
    return folder


def _packed_values(values_RK: NDArray[np.float64], config: Config) -> list[list[int]]:
    if config.delta_encoding:
        values_RK = np.diff(values_RK, axis=1, prepend=0.0)
    exact_RK, fitted_RK = np.split(values_RK, [config.exact_k], axis=1)
    parts = [exact_RK.astype(np.float32)]
    if config.polynomial_terms:
        basis_KC = polynomial_basis(config.polynomial_terms, config.num_fitted, normalize_t=config.normalize_t)
        parts.append((fitted_RK @ np.linalg.pinv(basis_KC).T).astype(np.float32))
    return [[*row.tobytes()] for row in np.concatenate(parts, axis=1)]


def _packed_ids(ids_RK: NDArray[np.int64], config: Config) -> list[list[int]]:
    bits = (ids_RK[:, :, None] >> np.arange(config.id_bits)[::-1]) & 1
    return np.packbits(bits.reshape(len(ids_RK), -1).astype(np.uint8), axis=1).tolist()


def defects(examination: Examination) -> dict[str, str | None]:
    """What is wrong, and the flag that mends it."""
    return {finding.name: finding.repair for finding in examination.findings if finding.severity != "note"}


def notes(examination: Examination) -> set[str]:
    """What is said of a cache and is no defect."""
    return {finding.name for finding in examination.findings if finding.severity == "note"}
