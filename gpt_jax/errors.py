"""The one exception whose message is meant for users."""


class UserError(Exception):
    """An error that the user can fix. The message says what was wrong, where, and what to do, in one line.

    The command line prints it without a traceback and exits with status 1. Anything else that is raised is a bug.
    """
