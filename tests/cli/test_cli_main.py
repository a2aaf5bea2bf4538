"""The command line: one sentence and exit status 2 for a user's mistake, a traceback for ours."""

import argparse

import pytest

from kdcache import __version__
from kdcache.cli import main as cli
from kdcache.errors import ConfigError


class Raises:
    """A command that fails as it is told."""

    def __init__(self, error):
        self.error = error

    def add_arguments(self, parser):
        pass

    def run(self, args):
        raise self.error


def run(error, **args):
    return cli.run_command(Raises(error), argparse.Namespace(**args))


def test_version_and_help_leave_with_0(capsys):
    for arguments in (["--version"], ["--help"], ["capture", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert __version__ in out
    assert "input.window.size  (whole number; default 1024)" in out


def test_every_command_is_listed_and_has_help(capsys):
    assert cli.main([]) == 2
    listed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n    {name} " in listed
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0


def test_wrong_usage_leaves_with_2(capsys):
    for arguments in (["nonsense"], ["capture"], ["capture", "x.yaml", "--nonsense"], ["--nonsense"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
    assert "usage: kdcache" in capsys.readouterr().err


def test_an_error_of_ours_is_one_sentence(capsys):
    assert run(ConfigError("selection.k: expected a whole number, got 'x'")) == 2
    assert capsys.readouterr().err == "kdcache: error: selection.k: expected a whole number, got 'x'\n"


def test_verbose_adds_the_traceback(capsys):
    assert run(ConfigError("selection.k"), verbose=True) == 2
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["-v", "info", "nowhere"]) == cli.main(["info", "nowhere", "-v"]) == 2
    assert capsys.readouterr().err.count("Traceback") == 2


def test_a_bug_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())


def test_an_interrupt_leaves_with_130_and_says_how_to_go_on(capsys):
    assert run(KeyboardInterrupt("run the same command again")) == 130
    assert "kdcache: interrupted: run the same command again" in capsys.readouterr().err
