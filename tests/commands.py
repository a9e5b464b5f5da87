"""The end of a command, for the tests of commands."""

import pytest


def one_line(capsys, main, *arguments, status: int = 2) -> str:
    """The only line on stderr of a command that ends with a status: 2 is for what the user can mend."""
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error
