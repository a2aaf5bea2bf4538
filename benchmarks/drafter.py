"""A drafter (EAGLE-3, speculators' own model and data loader) from a cache's states: bfloat16 against int8, and their bytes.

    python benchmarks/drafter.py --teacher demo-output/teacher --text demo-output/teacher/text/capture.jsonl --work /tmp/drafter

The question: does a drafter learn as well from states that are kept in a quarter of the bytes? The same teacher is captured
once for each dtype; speculators makes one draft model, which is trained the same number of steps on the same batches from each
cache by the backend `kdcache`, and measured on the same held-out tenth of the sequences. Its trainer wants a GPU, so the loop
here is its own without one. Needs speculators and hs-connectors (tools/setup installs them).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.export.torch_files import export_speculators
from kdcache.loader.cache import Cache, open_cache

RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, str]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8, scale per vector": {"dtype": "int8", "scale": "vector"},
    "int8, scale per channel": {"dtype": "int8", "scale": "channel"},
}
SEQ_LEN = 1024


def main() -> None:
    """Capture, train, and write the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    config = json.loads((args.teacher / "config.json").read_text())
    num_layers, hidden_size = config["num_hidden_layers"], config["hidden_size"]
    layers = [2, num_layers // 2, max(num_layers - 3, num_layers // 2 + 1), num_layers]
    folders = {name: args.work / name.replace(", ", "-").replace(" ", "-") for name in VARIANTS}
    rows = {}
    for name, how in VARIANTS.items():
        _capture(args, folders[name] / "cache", layers, how)
        with open_cache(folders[name] / "cache") as cache:
            if not (folders[name] / "data").exists():
                export_speculators(cache, str(folders[name] / "cache"), folders[name] / "data", with_states=False)
            rows[name] = {"bytes": _feature_bytes(cache)}
    start = _first_model(args, folders["bfloat16"] / "data", layers)
    for name, folder in folders.items():
        rows[name] |= _train(args, folder / "data", start, hidden_size)
        print(name, rows[name], flush=True)
    rows["speculators' own files (bfloat16)"] = {"bytes": len(layers) * hidden_size * 2.0}
    _write(args, rows, layers, hidden_size)


def _capture(args: argparse.Namespace, out: Path, layers: list[int], how: dict[str, str]) -> None:
    fields: dict[str, Any] = {
        "input": {"format": "jsonl", "paths": [str(args.text)], "window": {"size": 256}, "limit": args.items},
        "teacher": {"model": str(args.teacher), "backend": "transformers"},
        "selection": {"kind": "threshold", "tau": 0.04},
        "features": [{"layer": layer, "positions": "all", **how} for layer in layers],
        "out": str(out),
    }
    run_capture(convert_config(fields, CaptureConfig))


def _feature_bytes(cache: Cache) -> float:
    """Bytes of the features' columns per token."""
    columns = [item for shard in cache.manifest.shards for item in shard.column_bytes.items()]
    return sum(size for name, size in columns if name.startswith("feature:")) / int(cache.num_tokens_S.sum())


def _first_model(args: argparse.Namespace, data: Path, layers: list[int]) -> Path:
    """The untrained drafter that speculators makes for this teacher."""
    out = args.work / "first"
    if not (out / "config.json").exists():
        command = [sys.executable, "-m", "speculators.train", "--dry-run", "--verifier-name-or-path", str(args.teacher)]
        command += ["--data-path", str(data), "--speculator-type", "eagle3", "--num-layers", "1", "--save-path", str(out)]
        command += ["--draft-attn-impl", "sdpa", "--loss-implementation", "eager", "--hidden-states-dtype", "float32"]
        command += ["--target-layer-ids", *map(str, layers[:-1])]
        subprocess.run(command, check=True, capture_output=True)
    return out


def _train(args: argparse.Namespace, data: Path, start: Path, hidden_size: int) -> dict[str, float]:
    from hs_connectors import HiddenStatesBackend
    from speculators.model import SpeculatorModel
    from speculators.models.eagle3.data import shift_batch
    from speculators.train.dataloader import create_train_val_loaders

    import kdcache.export.speculators_backend  # noqa: F401 - registers

    transfer = HiddenStatesBackend.registry["kdcache"].from_train_args(argparse.Namespace(kdcache_cache=None), str(data))
    torch.manual_seed(0)
    kind: Any = SpeculatorModel.registry["eagle3"]  # pyright: ignore[reportOptionalSubscript]
    config = kind.config_class.from_pretrained(str(start))
    config.transformer_layer_config._attn_implementation = "sdpa"  # is not saved; flex attention wants a GPU
    model = kind.from_pretrained(str(start), config=config).float()
    train, held_out = create_train_val_loaders(
        data_path=str(data), total_seq_len=SEQ_LEN, hidden_states_dtype=torch.float32, transfer=transfer, vllm_endpoint="",
        on_missing="raise", verifier_name_or_path=str(args.teacher), request_timeout=None, max_retries=0,
        generation_validation_retries=0, max_consecutive_generation_failures=1, hidden_size=hidden_size, num_target_layers=3,
        num_workers=0, prefetch_factor=1, preprocess=shift_batch, train_data_ratio=0.9, seed=0,
    )  # fmt: skip
    call, _ = kind.get_trainer_kwargs(loss_fn="kl_div", loss_implementation="eager", ttt_steps=3, ttt_step_loss_decay=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    steps = 0
    while steps < args.steps:
        for batch in train:
            loss = _loss(model, batch, call)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == args.steps:
                break
    model.eval()
    with torch.no_grad():
        losses = [float(_loss(model, batch, call)) for batch in held_out]
    return {"loss": sum(losses) / len(losses)}


def _loss(model: Any, batch: dict[str, Any], call: dict[str, Any]) -> torch.Tensor:
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return model(**tensors, **call)[1]


def _write(args: argparse.Namespace, rows: dict[str, dict[str, float]], layers: list[int], hidden_size: int) -> None:
    first = rows["bfloat16"]["loss"]
    lines = [
        "# A drafter from cached states",
        "",
        f"`python benchmarks/drafter.py`: teacher of {layers[-1]} layers, hidden size {hidden_size}; states of the layers "
        f"{', '.join(map(str, layers))} at all tokens; {args.steps} steps of {SEQ_LEN} tokens; one layer of EAGLE-3.",
        "",
        "| states kept as | bytes per token | held-out loss | against bfloat16 |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        loss = row.get("loss")
        shown = ("", "") if loss is None else (f"{loss:.4f}", f"{100 * (loss / first - 1):+.2f} %")
        lines.append(f"| {name} | {row['bytes']:,.0f} | {shown[0]} | {shown[1]} |")
    RESULTS.joinpath("drafter.md").write_text("\n".join(lines) + "\n")
    RESULTS.joinpath("drafter.json").write_text(json.dumps(rows, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with `text`")
    parser.add_argument("--work", type=Path, required=True, help="caches and models; what is there is used again")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
