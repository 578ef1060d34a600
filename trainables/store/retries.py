"""What is tried again after it failed, how often, and after which wait."""

from __future__ import annotations

import pickle

MAX_FAILURES = 3  # in a row, without getting any further
FIRST_WAIT_SECONDS = 2.0
FACTOR = 4.0
# A program that is wrong, or is asked for what cannot be, is so at every try. RuntimeError is not
# among them: it is torch's word for a device that failed and for a worker that is gone, too.
OWN_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def wait_after(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return FIRST_WAIT_SECONDS * float(FACTOR ** (failures - 1))
