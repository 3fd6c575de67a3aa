"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback; notebooks and Python callers may catch it.
    """
