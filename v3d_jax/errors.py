"""Errors that a user can cause, and how the command line reports them."""

import errno
import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2
# Of a disk that takes no more, wherever it happens.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class UserError(Exception):
    """Bad input: the message is one line that says what was wrong and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a `UserError` or a full disk is one line on stderr, exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"error: {error.strerror}: {error.filename or 'a file'}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
