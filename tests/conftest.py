"""What all tests share: property tests without a deadline, since no test may depend on a clock."""

from hypothesis import settings

settings.register_profile("no_clock", deadline=None)
settings.load_profile("no_clock")
