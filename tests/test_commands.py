"""`python -m tvm_ref` names the commands."""

import pytest

from tvm_ref.__main__ import main


@pytest.mark.parametrize("command", ["tvm_ref.toy", "tvm_ref.bound", "tvm_ref.experiments.compare", "imagenet.train"])
def test_every_command_is_listed_with_what_it_does(command, capsys):
    main()
    (line,) = (a for a in capsys.readouterr().out.splitlines() if a.startswith(f"python -m {command} "))
    assert len(line.split(maxsplit=3)[3]) > 20
