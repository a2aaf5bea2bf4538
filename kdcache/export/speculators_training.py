"""speculators' own trainer, which also knows the backend `kdcache`: `python -m kdcache.export.speculators_training ...`.

The arguments are those of `python -m speculators.train`; add `--hidden-states-backend kdcache`. torchrun takes the module too.
"""

from __future__ import annotations

from importlib import import_module

from kdcache.extras import needed_for


def main() -> None:
    """Train a drafter with speculators."""
    with needed_for("training drafters with speculators", None):
        import_module("kdcache.export.speculators_backend")  # its trainer asks for the names of backends when it is imported
        from speculators.train.cli import main as train
        from speculators.train.config import TrainConfig
    train(TrainConfig.resolve())


if __name__ == "__main__":
    main()
