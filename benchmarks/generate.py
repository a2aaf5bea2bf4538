"""What does it cost to read answers back, so that their distributions are captured as any text's are, beside writing them?

Method: a random Llama model made on the fly, vLLM's engine in this process, prompts of random tokens, seeded draws at
temperature 1, all answers of full length. Interleaved in one engine; a share is the median over rounds of seconds / seconds of
the same round: CPU seconds of the process where the engine runs on a CPU (wall time measures the machine's other jobs), wall
time elsewhere.

- write: `VllmTeacher.generate`, nothing captured.
- read: `VllmTeacher.score` of prompts and answers on the worker route: top k at every token of the answers.
- engine: writing with the engine's own `logprobs=k` in its flat container, before filters: one pass, no reading back; what the
  alternative could not be faster than.

    python benchmarks/generate.py [--quick] [--body deep] [--vocab 32768] [--entries 64] [--prompts 64] [--prompt-tokens 128]
                                  [--answer-tokens 128] [--rounds 3] [--threads 1] [--out benchmarks/results]

Writes generate.json and prints the table that generate.md holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from capture import STEP_TOKENS, Case, build_model, top_k  # first: it sets what vLLM reads when it is imported


class Unending:
    """Stands for a tokenizer: the model has none, and no answer ends early."""

    end_ids = ()

    @property
    def identity(self) -> Any:
        from kdcache.format.manifest import TokenizerIdentity

        return TokenizerIdentity(name="none", fingerprint="", vocab_size=0)

    def decode(self, _: Any) -> str:
        return ""


class Variants:
    """The things that are timed, over one engine."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        from kdcache.config.capture import GenerateConfig
        from kdcache.config.teacher import TeacherConfig, VllmConfig
        from kdcache.teacher import load_teacher

        common: dict[str, Any] = {"tokens_per_forward": STEP_TOKENS, "num_threads": args.threads, "chunk_positions": 256}
        self._teacher: Any = load_teacher(
            TeacherConfig(model=str(folder), backend="vllm", vllm=VllmConfig(route="worker"), **common)
        )
        self._config = GenerateConfig(max_tokens=args.answer_tokens, ignore_eos=True)
        self._prompts = make_prompts(args)
        self._k = args.entries
        self._sequences: list[Any] = []

    def write(self) -> None:
        """All answers; kept for `read`."""
        from kdcache.capture.generate import answered

        answers = list(self._teacher.generate(self._prompts, self._config, Unending()))
        self._sequences = [answered(p, a, "") for p, a in zip(self._prompts, answers, strict=True)]

    def read(self) -> None:
        """Records of what was written last."""
        for _ in self._teacher.score(self._sequences, top_k(self._k)):
            pass

    def engine(self) -> None:
        """Answers and the engine's own logprobs, in the groups in which `write` asks for them."""
        from kdcache.teacher.generation import Ending
        from kdcache.teacher.vllm.generate import _groups, sampling_params

        ending = Ending(self._config, Unending(), frozenset())  # pyright: ignore[reportArgumentType]
        for group in _groups(self._teacher._engine, self._prompts, self._config):
            params = [sampling_params(prompt, ending, sees_text=False) for prompt in group]
            for param in params:
                param.logprobs, param.flat_logprobs = self._k, True
            requests = [{"prompt_token_ids": prompt.sequence.input_ids_N.tolist()} for prompt in group]
            with self._teacher._python_as_it_is():
                self._teacher._engine.generate(requests, params, use_tqdm=False)

    def close(self) -> None:
        """End the engine."""
        self._teacher.close()


def make_prompts(args: argparse.Namespace) -> list[Any]:
    """Random tokens, all of one length."""
    from kdcache.format.record import TokenSequence, sequence_key
    from kdcache.teacher.generation import Prompt, answer_seed

    rng, none_N = np.random.default_rng(0), np.zeros(args.prompt_tokens, np.bool_)
    roles_N, starts = np.zeros(args.prompt_tokens, np.uint8), np.array([0, args.prompt_tokens], np.int32)
    prompts = []
    for _ in range(args.prompts):
        ids_N = rng.integers(0, args.vocab, args.prompt_tokens).astype(np.int32)
        key = sequence_key(ids_N, none_N, "")
        prompts.append(Prompt(TokenSequence(ids_N, none_N, roles_N, starts, "random", key), answer_seed(0, key, 0)))
    return prompts


def seconds_of(call: Callable[[], None]) -> float:
    """CPU seconds where vLLM computes in this process, else wall seconds."""
    from kdcache.teacher.vllm.engine import runs_on_cpu

    clock = time.process_time if runs_on_cpu() else time.perf_counter
    started = clock()
    call()
    return clock() - started


def table(args: argparse.Namespace, rounds: list[dict[str, float]]) -> str:
    """The results in words and numbers."""

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(seconds) for seconds in rounds)

    tokens = args.prompts * args.answer_tokens
    share = median(lambda s: s["read"] / (s["write"] + s["read"]))
    both = median(lambda s: s["write"] + s["read"])
    return "\n".join(
        [
            f"{args.body} body, vocabulary {args.vocab:,}, k = {args.entries}; {args.prompts} prompts of {args.prompt_tokens} "
            f"tokens, answers of {args.answer_tokens}; {args.threads} threads; medians of {len(rounds)} rounds",
            "",
            "| | answer tokens/s | |",
            "|---|---|---|",
            f"| write | {tokens / median(lambda s: s['write']):,.0f} | |",
            f"| write, then read back | {tokens / both:,.0f} | reading is {share:.1%} of it |",
            f"| write with the engine's logprobs | {tokens / median(lambda s: s['engine']):,.0f} "
            f"| {median(lambda s: s['engine'] / (s['write'] + s['read'])):.2f} of the time of the line above |",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a thin body and a few short answers: shows that it works")
    parser.add_argument("--body", default="deep")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    numbers = {
        "vocab": 32768,
        "entries": 64,
        "prompts": 64,
        "prompt-tokens": 128,
        "answer-tokens": 128,
        "rounds": 3,
        "threads": 1,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.quick:
        args.body, args.vocab, args.prompts, args.prompt_tokens, args.answer_tokens, args.rounds = "thin", 8192, 8, 16, 16, 1
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder), Case(args.body, args.vocab, (), (), args.rounds, args.threads, 0, 0))
        variants = Variants(Path(folder), args)
        names = ("write", "read", "engine")
        # The first round warms up.
        rounds = [{name: seconds_of(getattr(variants, name)) for name in names} for _ in range(args.rounds + 1)]
        variants.close()
    text = table(args, rounds[1:])
    print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        (args.out / "generate.json").write_text(json.dumps({"settings": settings, "rounds": rounds[1:]}, indent=1) + "\n")
        (args.out / "generate.md").write_text(text)


if __name__ == "__main__":
    main()
