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


def plot_terms(curves: Mapping[str, Curves], path: str | Path) -> bool:
    """Write a PNG of how each term of the students' losses fell: a panel per term, a line per student.

    Args:
        curves: student -> term -> points, as `kdcache.report.terms.term_curves` gives them.
        path: the file; replaced.

    Returns:
        Whether there was anything to draw; else no file is written.

    Raises:
        MissingDependencyError, ConfigError: as `plot_evaluation`.
    """
    if not any(curves.values()):
        return False
    with needed_for("the plot of a loss's terms"):
        from kdcache.report import _matplotlib
    try:
        _matplotlib.draw_terms(curves, Path(path))
    except OSError as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error.strerror}") from error
    return True
