"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """What was expected, what arrived, what to do, in one sentence.

    The command line prints the sentence and exits; a traceback means a fault of this package.

    Attributes:
        status: What the command line exits with.
        said: Whether the sentence has been printed already, as it is before a run of several processes ends.
    """

    status = 2
    said = False


class SickRun(InputError):
    """A run that was begun, and cannot go on: its numbers are not finite, or its results cannot be written."""

    status = 1
