"""What the tests of the accounting package share."""

import pytest

from dpsb_accounting import cli


@pytest.fixture
def call(capsys):
    """Runs the command line; returns its exit code, stdout and stderr."""

    def _call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return _call
