import errno

import pytest

from v3d_jax import errors


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (errors.UserError("name a file"), "error: name a file\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/log.csv"),
            "error: No space left on device: run/log.csv\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(error, line, capsys):
    with pytest.raises(SystemExit) as caught:
        errors.run(raising(error))
    assert caught.value.code == errors.USER_ERROR_STATUS
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, "a bug")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        errors.run(raising(error))
