"""The exceptions whose messages are meant for users."""


class UserError(Exception):
    """An error that the user can fix. The message says what was wrong, where, and what to do, in one line.

    The command line prints it without a traceback and exits with status 1. Anything else that is raised is a bug.
    """


class TooLongError(UserError):
    """A text, with what is to be added to it, that the model's context has no room for."""
