"""What a term's options are called, read from the signature of its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from kdcache.config.describe import nearest
from kdcache.train.terms.base import Term


def wrong_options(kind: type[Term], options: Mapping[str, Any]) -> str | None:
    """Say which option a term lacks or needs: "has no option 'projecter'; did you mean 'projector'? it has ...".

    Returns:
        None where all names are right.
    """
    # torch's own constructor is declared to take anything, and then refuses it.
    has_own = kind.__init__ is not nn.Module.__init__
    parameters = list(inspect.signature(kind).parameters.values()) if has_own else []
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    known = {one.name: one for one in named if one.kind != one.POSITIONAL_ONLY}
    has = f"it has {', '.join(known) or 'none'}"
    takes_any = any(one.kind == one.VAR_KEYWORD for one in parameters)
    for name in [] if takes_any else [name for name in options if name not in known]:
        near = nearest(name, known)
        return f"has no option {name!r}; " + (f"did you mean {near!r}? {has}" if near else has)
    missing = [repr(name) for name, one in known.items() if one.default is one.empty and name not in options]
    if missing:
        return f"needs the option{'s' * (len(missing) > 1)} {', '.join(missing)}; {has}"
    return None
