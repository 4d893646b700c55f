"""Binomial bounds of a calibration, compared with scipy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from retroexit.routing.calibration import most_group_violations, most_violations, samples_needed


@given(st.integers(1, 3000), st.floats(0.005, 0.5), st.floats(0.5, 0.999))
def test_so_many_bad_samples_still_show_the_rate_and_one_more_does_not(samples, alpha, confidence):
    bad = most_violations(samples, alpha, confidence)
    assert bad < 0 or binom.cdf(bad, samples, alpha) <= (1 - confidence) * (1 + 1e-9)
    assert binom.cdf(bad + 1, samples, alpha) > (1 - confidence) * (1 - 1e-9)


@pytest.mark.parametrize(("alpha", "confidence", "needed"), [(0.05, 0.95, 59), (0.1, 0.9, 22), (0.01, 0.99, 459)])
def test_the_samples_needed_are_those_of_the_rule_of_three(alpha, confidence, needed):
    assert samples_needed(alpha, confidence) == needed
    assert (1 - alpha) ** needed <= 1 - confidence < (1 - alpha) ** (needed - 1)


@pytest.mark.parametrize("groups", [58, 59, 100, 400])
def test_shares_of_groups_take_as_many_groups_as_samples_without_violations(groups):
    total = most_group_violations(groups, 0.05, 0.95)
    assert (total >= 0) == (groups >= 59)
    assert total <= most_violations(groups, 0.05, 0.95) + 1, "shares that are 0 or 1 are a special case"
