"""What a capture will cost, before its teacher is loaded: tokens, bytes and, if it can be known, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache import extensions
from kdcache.capture.features import features_of, stated_features
from kdcache.capture.generate import write_sequences
from kdcache.capture.job import Job, check_fits, codec_info, output_location, prepare, selection_info
from kdcache.capture.plan import Plan
from kdcache.capture.requests import Request, make_requests, most_tokens
from kdcache.capture.sequences import CutCounts
from kdcache.capture.unit import blaming_teacher, score_records
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.codec import get_codec
from kdcache.codec.features.constants import constant_bytes
from kdcache.codec.features.vectors import bytes_per_vector
from kdcache.config.capture import CaptureConfig
from kdcache.errors import ConfigError, InputError
from kdcache.format.feature_positions import num_vectors
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.output_projection import OUTPUT_PROJECTION
from kdcache.format.record import Distributions, TokenSequence
from kdcache.format.record_checks import check_distributions
from kdcache.format.selection import fixed_entries, fixed_exact, has_estimates, most_entries
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import Item
from kdcache.inputs.left_out import LeftOut
from kdcache.store import chain
from kdcache.store.writing.writer import refuse_foreign_directory
from kdcache.teacher import find_backend, load_teacher
from kdcache.teacher.generation import Prompt

SAMPLE_UNITS = 16
SAMPLE_ITEMS_PER_UNIT = 8
SAMPLE_CHARS_PER_ITEM = 20_000
PROBE_TOKENS = 4096
SEQUENCE_BYTES = 120
"""Key, digest, source, offsets: what a sequence costs besides its tokens and positions."""
SHARD_BYTES = 5000
"""Arrow's schema, footer and framing of one shard of one record batch."""


class FeatureEstimate(NamedTuple):
    """What a feature costs.

    Attributes:
        bytes_per_vector: of which each of its positions, or each sequence, has one.
        per: `position` or `sequence`.
        num_bytes: of all vectors.
        num_vectors: about this many.
        sidecar_bytes: of what is fitted to a sample and kept once.
    """

    feature: FeatureInfo
    bytes_per_vector: int
    per: Literal["position", "sequence"]
    num_bytes: int
    num_vectors: int = 0
    sidecar_bytes: int = 0


@dataclass(frozen=True)
class CaptureEstimate:
    """What a dry run found.

    Tokens, positions, bytes and seconds are estimates for the whole plan. If the teacher writes answers they are upper
    bounds, with a sequence for each answer.


    Attributes:
        num_files: 0 for a dataset.
        num_units_before: units already published.
        num_sampled_items: items that the estimates are based on.
        bytes_per_position: bytes of the codec's columns, and of the count of entries if that varies.
        bytes_are: `expected`; `most`, where the number of entries follows from the teacher, which has not been asked; or
            `measured`, by the probe.
        num_bytes: of all, features and sidecars included.
        output_projection_bytes: of this sidecar; None where it is not asked for, or the model's config does not say its sizes.
        template_time: the time that the chat template is given; None if it does not ask.
        notes: what the sampled items hold but is not used: sentence -> items.
        tokens_per_second: measured by a probe or by the units already published; None if neither.
        left_out: files, folders and links of the input that are not read.
    """

    plan: Plan
    num_files: int
    num_units_before: int
    num_sampled_items: int
    num_tokens: int
    num_positions: int
    num_sequences: int
    bytes_per_position: float
    bytes_are: Literal["expected", "most", "measured"]
    num_bytes: int
    tokens_per_second: float | None
    features: tuple[FeatureEstimate, ...] = ()
    output_projection_bytes: int | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: Mapping[str, int] = field(default_factory=dict)
    template_time: str | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds for the units not published yet; None if no speed is known."""
        if self.tokens_per_second is None:
            return None
        share = 1 - self.num_units_before / max(1, len(self.plan.units))
        return self.num_tokens * share / self.tokens_per_second


class _Probed(NamedTuple):
    """Speed and size, known or expected."""

    tokens_per_second: float | None
    bytes_per_position: float
    features: tuple[FeatureInfo, ...]
    is_measured: bool = False


def estimate_capture(config: CaptureConfig, progress: CaptureProgress | None = None, *, probe: bool = False) -> CaptureEstimate:
    """Plan a capture, tokenise a sample of its input, and estimate what it would cost. Writes nothing.

    Args:
        config: of the capture.
        progress: is told of the scan of the input.
        probe: also load the teacher, time it on a few sequences, and measure what its answers take.

    Raises:
        As `run_capture` does before it starts.
    """
    progress = progress or CaptureProgress()
    refuse_foreign_directory(output_location(config))
    with closing(prepare(config, progress)) as job:
        items = _sample(job)
        vocab_size = job.tokenizer.identity.vocab_size
        requests, counts = _requests_of(items, job)
        probed = _probe(job, requests) if probe else None
        if probed is None:
            probed = _Probed(_past_speed(job), _expected_bytes(config, vocab_size), _features_known_before(config))
        return replace(_scale(job, items, requests, probed), notes=counts.notes, template_time=job.template_time)


def _requests_of(items: list[Item], job: Job) -> tuple[list[Request], CutCounts]:
    """Make the teacher's requests, without unreadable items if a capture would leave them out too."""
    if not job.config.run.skip_failing:
        return make_requests(items, job.tokenizer, job.config, vocab_size=2**31)
    requests, counts = [], CutCounts()
    for item in items:
        try:
            of_item, counted = make_requests([item], job.tokenizer, job.config, vocab_size=2**31)
        except InputError as error:
            counts.note({f"left out by run.skip_failing, as in {error}": 1})
            continue
        requests += of_item
        counts.add(counted)
    return requests, counts


def _sample(job: Job) -> list[Item]:
    """Read the first items of some units, spread evenly over the plan; long texts are clipped."""
    units = job.plan.units
    chosen = sorted({round(i) for i in np.linspace(0, len(units) - 1, SAMPLE_UNITS)}) if units else []
    if job.plan.is_stream:
        chosen = chosen[:1]
    sample: list[Item] = []
    for index in chosen:
        count = min(SAMPLE_ITEMS_PER_UNIT, units[index].num_items)
        sample += [_clip(item, job.config) for item in islice(job.reader.items(units[index].start), count)]
    return sample


def _clip(item: Item, config: CaptureConfig) -> Item:
    # A chat cannot be clipped without breaking its template, nor a text that is refused, truncated or answered as a whole.
    if isinstance(item.content, Chat) or config.input.window.policy != "split" or config.generate is not None:
        return item
    return replace(item, content=item.content[:SAMPLE_CHARS_PER_ITEM])


def _scale(job: Job, items: list[Item], requests: list[Request], probed: _Probed) -> CaptureEstimate:
    plan, bytes_per_position = job.plan, probed.bytes_per_position
    by_items = plan.is_stream or job.config.input.window.policy == "truncate" or job.config.generate is not None
    sampled = len(items) if by_items else sum(item.num_chars for item in items)
    factor = (plan.num_items if by_items else plan.num_chars) / max(1, sampled)
    tokens = round(factor * most_tokens(requests, job.config))
    positions = round(factor * _most_positions(requests, job.config))
    num_sequences = round(factor * len(requests))
    features = tuple(_feature_estimate(feature, requests, job.config, factor) for feature in probed.features)
    manifests, projection = chain.manifest_numbers(job.path), _projection_bytes(job)
    return CaptureEstimate(
        plan=plan,
        num_files=len(job.reader.files),
        num_units_before=len(chain.newest_manifest(job.path).shards) if manifests else 0,
        num_sampled_items=len(items),
        num_tokens=tokens,
        num_positions=positions,
        num_sequences=num_sequences,
        bytes_per_position=bytes_per_position,
        bytes_are=_bytes_are(job.config, probed),
        num_bytes=round(
            positions * bytes_per_position
            + tokens * (4 + 1 / 8)
            + sum(estimate.num_bytes + estimate.sidecar_bytes for estimate in features)
            + (projection or 0)
            + num_sequences * SEQUENCE_BYTES
            + len(plan.units) * SHARD_BYTES
        ),
        tokens_per_second=probed.tokens_per_second,
        features=features,
        output_projection_bytes=projection,
        left_out=job.reader.left_out,
    )


def _projection_bytes(job: Job) -> int | None:
    """About the bytes of the sidecar `output_projection`: a number for each id and each number of a hidden state."""
    config = job.config.teacher
    shape = find_backend(config.backend).hidden_shape(config) if OUTPUT_PROJECTION in job.config.sidecars else None
    item_bytes = 4 if config.dtype == "float32" else 2
    return None if shape is None else job.tokenizer.identity.vocab_size * shape.size * item_bytes


def _feature_estimate(feature: FeatureInfo, requests: list[Request], config: CaptureConfig, factor: float) -> FeatureEstimate:
    per = "position" if feature.pooling == "none" else "sequence"
    count = round(factor * sum(num_vectors(feature, _most_supervised(request, config)) for request in requests))
    num_bytes = bytes_per_vector(feature)
    return FeatureEstimate(feature, num_bytes, per, count * num_bytes, count, constant_bytes(feature))


def _most_supervised(request: Request, config: CaptureConfig) -> NDArray[np.bool_]:
    """A sequence's mask; of a prompt, that of the longest sequence that it may become."""
    if isinstance(request, TokenSequence):
        return request.supervised_N
    most = 0 if config.generate is None else config.generate.max_tokens
    prompt = request.sequence.num_tokens
    return np.arange(prompt + most) >= prompt - 1


def _most_positions(requests: list[Request], config: CaptureConfig) -> int:
    if config.generate is not None:
        return len(requests) * config.generate.max_tokens
    return sum(int(sequence.supervised_N.sum()) for sequence in requests if isinstance(sequence, TokenSequence))


def _bytes_are(config: CaptureConfig, probed: _Probed) -> Literal["expected", "most", "measured"]:
    if probed.is_measured:
        return "measured"
    codec = extensions.find("codecs", config.codec_id)
    follows_content = codec.size_follows_content or fixed_entries(selection_info(config)) is None
    return "most" if follows_content else "expected"


def _expected_bytes(config: CaptureConfig, vocab_size: int) -> float:
    """Encode made-up distributions with the most entries that the selection can have."""
    selection = selection_info(config)
    k = min(vocab_size, most_entries(selection, vocab_size))
    return _encoded_bytes(config, vocab_size, [_made_up(selection, k, vocab_size)])


def _made_up(selection: SelectionInfo, k: int, vocab_size: int) -> Distributions:
    """Make 64 positions of k entries.

    Every fourth target is not an exact entry; for `sampled`, none is. For `threshold` all entries are exact, which take
    the most bytes. Ids come from the whole vocabulary, each as often as any other.
    """
    num_positions, fixed = 64, fixed_exact(selection)
    num_exact = min(k, k if fixed is None else fixed)
    tail = 1.0 if num_exact == 0 else 0.5
    estimate = selection.params.get("tau") or tail / selection.params.get("num_draws", 1)
    logprobs_K = np.log(np.repeat([0.5 / max(num_exact, 1), estimate], [num_exact, k - num_exact]))
    rng = np.random.default_rng(0)
    logprobs_PK = np.tile(logprobs_K, (num_positions, 1))
    logprobs_PK[:, :num_exact] -= np.sort(rng.uniform(0.0, 12.0, (num_positions, num_exact)))
    step = vocab_size // max(k, 1)
    ids_PK = rng.permuted(np.arange(k) * step + rng.integers(0, max(step, 1), (num_positions, k)), axis=1)
    return Distributions(
        token_ids_E=ids_PK.reshape(-1).astype(np.int32),
        logprobs_E=logprobs_PK.reshape(-1).astype(np.float32),
        offsets_P1=np.arange(num_positions + 1, dtype=np.int64) * k,
        tail_mass_P=np.full(num_positions, tail, np.float32),
        outside_target_logprobs=np.full(num_positions // 4 if num_exact else num_positions, -9.0, np.float32),
        num_exact_P=np.full(num_positions, num_exact) if has_estimates(selection) else None,
        log_z_PL=np.ones((num_positions, len(selection.temperatures)), np.float32) if selection.temperatures else None,
        entropy_P=np.ones(num_positions, np.float32) if selection.entropy else None,
    )


def _encoded_bytes(config: CaptureConfig, vocab_size: int, answers: Sequence[Distributions]) -> float:
    """Return bytes per position: of the codec's columns, and of the count of entries if it is stored."""
    info, selection = codec_info(config, vocab_size), selection_info(config)
    columns = get_codec(info.codec_id, info.params, selection).encode(answers)
    num_positions = max(1, sum(distributions.num_positions for distributions in answers))
    return sum(column.nbytes for column in columns) / num_positions + 2 * (fixed_entries(selection) is None)


def _encoded_answers(config: CaptureConfig, teacher: TeacherIdentity, answers: Sequence[Distributions]) -> float:
    """As `_encoded_bytes` for a teacher's own answers, which no writer has checked."""
    with blaming_teacher(teacher):
        for distributions in answers:
            check_distributions(distributions, vocab_size=teacher.vocab_size)
    return _encoded_bytes(config, teacher.vocab_size, answers)


def _features_known_before(config: CaptureConfig) -> tuple[FeatureInfo, ...]:
    """The features that the config asks for, before the model is loaded; raises ConfigError where they are not known then."""
    features = stated_features(config)
    if features is None:
        raise ConfigError(
            f"features: the config.json of {config.teacher.model!r} cannot be read before the model is loaded, so the size of "
            "its hidden states is not known; download the model first, or let --dry-run --probe load it"
        )
    return features


def _probe(job: Job, requests: list[Request]) -> _Probed | None:
    """Run the real teacher on a few thousand tokens, after a first sequence that warms it up."""
    prompts = [asked for asked in requests if isinstance(asked, Prompt)]
    if prompts:
        return _probe_writing(job, prompts)
    config = job.config
    longest_first = sorted((s for s in requests if isinstance(s, TokenSequence)), key=lambda sequence: -sequence.num_tokens)
    if not longest_first:
        return None
    with closing(load_teacher(config.teacher)) as teacher:
        check_fits(config, teacher)
        list(score_records(longest_first[:1], teacher, config))
        chosen = longest_first[: max(1, PROBE_TOKENS // longest_first[0].num_tokens)]
        started = time.perf_counter()
        answers = [record.distributions for record in score_records(chosen, teacher, config)]
        speed = sum(sequence.num_tokens for sequence in chosen) / (time.perf_counter() - started)
        per_position = _encoded_answers(config, teacher.identity, answers)
        return _Probed(speed, per_position, features_of(config, teacher), is_measured=True)


def _probe_writing(job: Job, prompts: list[Prompt]) -> _Probed:
    """Run a teacher that writes: counts tokens of prompts and answers, timed with writing and reading back."""
    config, tokenizer = job.config, job.tokenizer
    assert config.generate is not None
    with closing(load_teacher(config.teacher)) as teacher:
        check_fits(config, teacher)
        list(write_sequences(prompts[:1], teacher, config, tokenizer, lambda _: None))
        chosen = prompts[: max(1, PROBE_TOKENS // config.generate.max_tokens)]
        started = time.perf_counter()
        sequences = list(write_sequences(chosen, teacher, config, tokenizer, lambda _: None))
        answers = [record.distributions for record in score_records(sequences, teacher, config)]
        speed = sum(sequence.num_tokens for sequence in sequences) / (time.perf_counter() - started)
        per_position = _encoded_answers(config, teacher.identity, answers)
        return _Probed(speed, per_position, features_of(config, teacher), is_measured=True)


def _past_speed(job: Job) -> float | None:
    """Compute tokens per second from the times at which an earlier run's shards appeared.

    None with fewer than two shards, and for an object store, where each time would be a request.
    """
    if not isinstance(job.path, Path) or not chain.manifest_numbers(job.path):
        return None
    shards = chain.newest_manifest(job.path).shards
    present = [(job.path / shard.name, shard.num_tokens) for shard in shards]
    times = sorted((path.stat().st_mtime, tokens) for path, tokens in present if path.exists())
    speeds = [tokens / (at - before) for (before, _), (at, tokens) in pairwise(times) if at > before]
    return median(speeds) if speeds else None
