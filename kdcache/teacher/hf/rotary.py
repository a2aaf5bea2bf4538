"""Give each text of a batch the rotary factors that it has alone, where a model derives them from the batch's longest text.

transformers chooses the factors of a longrope model, and computes those of a dynamic one, from the
largest position of the whole batch, and a dynamic one keeps them for the next call. Such modules
are found by asking them. Here each text, or each of several packed documents, gets the factors that it
would have alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.shown import get_logger
from kdcache.teacher.hf.proof import UNKNOWN_CONTEXT, untouched_generators

log = get_logger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

PROBE_TOKENS = 8
LARGEST_SCAN, BEYOND = 2**22, 4
"""Lengths up to this, and up to this many times the context, are scanned for other factors: students may exceed the context."""


class TextRotary:
    """The rotary modules of a model that depend on the length; most models have none, and then nothing here has an effect."""

    def __init__(self, modules: Sequence[PerText], lengths: Sequence[int]) -> None:
        self._modules, self._lengths = modules, lengths

    @property
    def depends_on_length(self) -> bool:
        """Whether some module's factors depend on the length, for texts of any length."""
        return bool(self._modules)

    @property
    def depends_within_context(self) -> bool:
        """Whether they do for texts that fit into the context."""
        return any(module.depends_on_length(self._lengths) for module in self._modules)

    @contextmanager
    def texts(self, lengths_B: Sequence[int]) -> Iterator[None]:
        """Declare, while the context is open, that text b has this many tokens, however many of them a forward reads.

        Otherwise a text is a run of positions that rise by one.
        """
        for module in self._modules:
            module.lengths_B = lengths_B
        try:
            yield
        finally:
            for module in self._modules:
                module.lengths_B = None

    def changes_at(self, length: int) -> bool:
        """Whether a text that grows to this length gets other factors than it had one token earlier."""
        return length > 1 and any(module.changes_at(length) for module in self._modules)


class PerText:
    """Replaces the forward of one rotary module."""

    def __init__(self, module: nn.Module, calls: Sequence[Call]) -> None:
        self.lengths_B: Sequence[int] | None = None
        # A library may have replaced it, as accelerate's hooks do.
        self._module, self._exchanged = module, module.__dict__.get("forward")
        self._pristine = _state(module)
        self._keys: dict[tuple[str, int], bytes] = {}
        self._calls = {_name(call): _small(call) for call in calls}

    def install(self) -> None:
        """Route the module's calls here from now on."""
        self._module.forward = self

    @property
    def has_table(self) -> bool:
        """Whether the module looks positions up in a table, which ends at the context."""
        plain, buffers = self._pristine
        return any(isinstance(value, Tensor) and value.ndim > 1 for value in (*plain.values(), *buffers.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        positions_BT = _positions(args, kwargs)
        if positions_BT is None:
            return self._stale((args, kwargs))
        name = _name((args, kwargs))
        self._calls.setdefault(name, _small((args, kwargs)))
        if self.lengths_B is not None and len(positions_BT) == 1:
            positions_BT = positions_BT.expand(len(self.lengths_B), -1)
        lengths_BT = self._lengths(positions_BT)
        groups: dict[bytes, list[int]] = {}
        for length in lengths_BT.unique().tolist():
            groups.setdefault(self.key(length, name), []).append(length)
        made, result = None, None
        for lengths in groups.values():
            isin_BT = torch.isin(lengths_BT, torch.tensor(lengths, device=lengths_BT.device))
            # An extra column holds the largest position of the group, which the module derives its factors from.
            last_B1 = torch.full_like(positions_BT[:, :1], max(lengths) - 1)
            # Positions of padding continue after a text.
            positions = torch.cat([positions_BT.where(isin_BT, 0).minimum(last_B1), last_B1], dim=1)
            made = self._fresh(_with_positions((args, kwargs), positions))
            parts = [part[..., :-1, :] for part in _parts(made)]
            mask = isin_BT[..., None] if parts[0].ndim == 3 else isin_BT[:, None, :, None]
            result = parts if result is None else [torch.where(mask, b, a) for a, b in zip(result, parts, strict=True)]
        assert result is not None
        return tuple(result) if isinstance(made, tuple) else result[0]

    def key(self, length: int, name: str) -> bytes:
        """A key that is equal for lengths with the same factors."""
        known = self._keys.get((name, length))
        if known is None:
            known = self._keys[name, length] = self._asked(length, name, fresh=True)
        return known

    def changes_at(self, length: int) -> bool:
        """See `TextRotary`."""
        return any(self.key(length, name) != self.key(length - 1, name) for name in self._calls)

    def depends_on_length(self, lengths: Sequence[int]) -> bool:
        """Whether factors differ between these lengths, or for a short text that follows a long one."""
        for name in self._calls:
            keys = [self.key(length, name) for length in lengths]
            if len(set(keys)) > 1:
                return True
            self._asked(max(lengths), name, fresh=False)
            if self._asked(lengths[0], name, fresh=False) != keys[0]:
                return True
        return False

    @torch.no_grad()
    def _asked(self, length: int, name: str, *, fresh: bool) -> bytes:
        call = self._calls[name]
        positions_BT = _positions(*call)
        assert positions_BT is not None
        positions_1T = torch.tensor([[0, 1, length - 1]], dtype=positions_BT.dtype, device=positions_BT.device)
        made = (self._fresh if fresh else self._stale)(_with_positions(call, positions_1T))
        factors = [part[..., 1, :].to(torch.complex128) for part in _parts(made)]
        return b"".join(torch.view_as_real(each).cpu().numpy().tobytes() for each in factors)

    def _stale(self, call: Call) -> Any:
        """The module's own forward, with whatever it kept of earlier texts."""
        args, kwargs = call
        if self._exchanged is not None:
            return self._exchanged(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def _fresh(self, call: Call) -> Any:
        """The module's own forward, from the state in which it was loaded, without anything of earlier texts."""
        args, kwargs = call
        plain, buffers = self._pristine
        for name in set(_plain(self._module)) - set(plain):
            del self._module.__dict__[name]
        self._module.__dict__.update(plain)
        device = next((part.device for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), None)
        moved = {name: buffer if buffer is None else buffer.to(device) for name, buffer in buffers.items()}
        self._module._buffers.clear()
        self._module._buffers.update(moved)
        return self._stale(call)

    def _lengths(self, positions_BT: Tensor) -> Tensor:
        if self.lengths_B is not None and len(self.lengths_B) == len(positions_BT):
            lengths_B = torch.tensor(self.lengths_B, device=positions_BT.device)
            return lengths_B[:, None].expand(positions_BT.shape)
        starts_BT = torch.ones_like(positions_BT, dtype=torch.bool)
        starts_BT[:, 1:] = positions_BT[:, 1:] != positions_BT[:, :-1] + 1
        # Cumulated over the flat batch, so that each run has an index of its own.
        runs_P = starts_BT.flatten().cumsum(0) - 1
        longest = torch.zeros(int(runs_P[-1]) + 1, dtype=positions_BT.dtype, device=positions_BT.device)
        longest.scatter_reduce_(0, runs_P, positions_BT.flatten() + 1, "amax")
        return longest[runs_P].view(positions_BT.shape)


@torch.no_grad()
def mend_rotary(model: Any) -> TextRotary:
    """Find the rotary modules whose factors depend on a text's length, and have each text of a batch get its own.

    A rotary module is one that is given positions and holds frequencies, or has "rotary" or "rope" in its class's name. It is
    asked for the factors of texts of many lengths, three positions each. A model without such a dependence is left as it is.
    """
    found = getattr(model, "_kdcache_rotary", None)
    if found is None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNKNOWN_CONTEXT
        modules = [PerText(module, calls) for module, calls in _rotary_calls(model)]
        needed = [module for module in modules if _is_needed(module, model, context)]
        for module in needed:
            module.install()
        found = TextRotary(needed, _lengths_to_scan(model, context))
        model.__dict__["_kdcache_rotary"] = found
    return found


def _is_needed(module: PerText, model: Any, context: int) -> bool:
    most = context if module.has_table else BEYOND * context
    try:
        return module.depends_on_length(_lengths_to_scan(model, most))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        log.debug("a rotary module cannot be asked alone: %s", error)
        return False


def _rotary_calls(model: Any) -> list[tuple[nn.Module, list[Any]]]:
    calls: dict[nn.Module, list[Any]] = {}

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if _positions(args, kwargs) is not None:
            calls.setdefault(module, []).append((args, kwargs))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in model.modules() if _is_rotary(module)]
    if not handles:
        return []
    ids_1T = (torch.arange(PROBE_TOKENS, device=model.device) + 1)[None] % model.config.get_text_config().vocab_size
    try:
        with untouched_generators(model):
            model.base_model(input_ids=ids_1T, use_cache=False)
    except Exception as error:  # a model that does not run is refused elsewhere, with a reason
        log.debug("the model does not run: %s", error)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.items())


def _is_rotary(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    named = "rotary" in name or "rope" in name
    return named or any("inv_freq" in buffer for buffer, _ in module.named_buffers(recurse=False))


def _lengths_to_scan(model: Any, most: int) -> list[int]:
    """Powers of two, every integer in the config that could be a length, and one more than each."""
    found = {length for i in range(1, 23) for length in (2**i, 2**i + 1)}
    found |= {length + more for length in _integers(model.config.get_text_config().to_dict()) for more in (0, 1)}
    most = min(most, LARGEST_SCAN)
    return sorted(length for length in found | {most} if 2 <= length <= most)


def _integers(value: Any) -> set[int]:
    if isinstance(value, dict):
        return set().union(*map(_integers, value.values()))
    return {value} if isinstance(value, int) and not isinstance(value, bool) else set()


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return _plain(module), dict(module._buffers)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes that a forward may have set."""
    own = ("forward", "training")
    return {name: value for name, value in module.__dict__.items() if not name.startswith("_") and name not in own}


def _is_positions(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and value.dtype != torch.bool


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if _is_positions(value)), None)


def _with_positions(call: Call, positions: Tensor) -> Call:
    args, kwargs = call
    new_args = tuple(positions if _is_positions(value) else value for value in args)
    return new_args, {name: positions if _is_positions(value) else value for name, value in kwargs.items()}


def _name(call: Call) -> str:
    """A name that tells the calls of one forward apart: some modules are called once per kind of layer."""
    args, kwargs = call
    return repr([pair for pair in (*enumerate(args), *kwargs.items()) if not isinstance(pair[1], Tensor)])


def _small(call: Call) -> Call:
    """The call with one token of its tensors, to be kept: only their dtype and device matter."""
    args, kwargs = call

    def small(value: Any) -> Any:
        return value[:1, :1].detach() if isinstance(value, Tensor) and value.ndim > 1 else value

    return tuple(map(small, args)), {name: small(value) for name, value in kwargs.items()}


def _parts(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)
