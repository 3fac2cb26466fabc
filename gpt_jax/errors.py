"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: what was wrong, where, and what to do, in one line.

    The command line prints it without a traceback and exits with status 1. Anything else that is raised is a bug.
    """
