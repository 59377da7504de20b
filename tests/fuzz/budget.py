"""Number of random cases: 1,000 in all, or the value of the environment variable MMVITZOO_FUZZ.

The 1,000 are the same in every run, so that a failure comes from a change. ``make fuzz`` draws new ones.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = int(os.environ.get('MMVITZOO_FUZZ', 1000))
seeds = st.integers(0, 2**64)  # for evenly distributed choices


def fuzz(per_thousand):
    """Gives a test its share of the cases; the shares of all tests add up to 1,000."""
    cases = max(1, CASES * per_thousand // 1000)
    return settings(
        max_examples=cases,
        derandomize='MMVITZOO_FUZZ' not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
