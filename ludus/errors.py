"""The errors that a user, and not a programmer, has to mend."""


class UserError(ValueError):
    """Bad input: a recipe, a path, a name, a checkpoint.

    The message says what is wrong, where, and how to mend it. The command line prints it in one line,
    without a traceback, and exits with status 2.
    """


class Lacking(UserError):
    """Something that a sound recipe needs is not on this machine, such as a data set."""
