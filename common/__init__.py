"""What the five scripts share: datasets, metrics, geometry, and what surrounds a training run."""


class UserError(ValueError):
    """Something that the user can mend: a flag, a file, a value. Its message ends the program."""
