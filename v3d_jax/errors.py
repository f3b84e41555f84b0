"""Errors that a user can cause, and how the command line reports them."""

import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2


class UserError(Exception):
    """Bad input: the message is one line that says what was wrong and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
