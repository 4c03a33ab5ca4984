"""What a user can mend, told in words."""


class UserError(ValueError):
    """A mistake in a configuration, a file or a command.

    The message begins with the key, path or argument to change, then says what was expected, what was got and how
    to mend it. `launch/` prints it without a traceback and exits with code 2.
    """
