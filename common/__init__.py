"""What the five scripts share: datasets, metrics, geometry, and what surrounds a training run."""
import errno


class UserError(ValueError):
    """Something that the user can mend: a flag, a file, a value. Its message ends the program."""


def message_of(error: Exception) -> str:
    """What an error that the user can mend says; "" for a bug."""
    text = str(error)
    if text.startswith("DataLoader worker"):
        return f"{text.strip(' .')}: out of memory? Try fewer --workers"
    if type(error).__name__ == "InductorError":
        return f"--compile: {text.splitlines()[0]}; install that, or leave out --compile"
    unnamed = isinstance(error, OSError) and error.errno and not error.filename
    unnamed = unnamed and error.errno != errno.ENOSPC  # a full disk, which names no file
    if unnamed or not isinstance(error, (OSError, UserError, FloatingPointError)):
        return ""
    if text.startswith("Caught "):  # by a loader's worker, whose traceback ends in the message
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return text
