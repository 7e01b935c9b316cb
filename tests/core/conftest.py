"""Property tests: the same examples in every run, and no deadline on a machine that others use as well."""

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
