"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """What was expected, what arrived, what to do, in one sentence.

    The command line prints the sentence and exits; a traceback means a fault of this package.
    """
