"""Pictures of an evaluation; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError
from kdcache.extras import needed_for
from kdcache.report.evaluation import Curves


def plot_evaluation(results: Mapping[str, Any], curves: Curves, path: str | Path) -> None:
    """Write a PNG: held-out loss while training (where the runs measured it), and bars of loss, KL and top-1 agreement.

    Args:
        results: as `kdcache.train.evaluation.compare.compare_models` gives them.
        curves: of each student; students without one are only in the bars.
        path: the file; replaced.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written.
    """
    with needed_for("the plot of an evaluation"):
        from kdcache.report import _matplotlib
    try:
        _matplotlib.draw_evaluation(results, curves, Path(path))
    except OSError as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error.strerror}") from error
