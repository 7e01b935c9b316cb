"""The one exception for mistakes a user can mend."""


class WinnowError(ValueError):
    """A user's mistake: the message says what was got, what is allowed, and what to do."""


class UnsupportedError(WinnowError):
    """This model, method or version cannot do what was asked; the message says what can."""


class WinnowWarning(UserWarning):
    """Something works, and may not be what was meant; the message says what to do."""
