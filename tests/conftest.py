"""Shared by all tests: a fresh random generator whose seed is printed when a test fails."""

import random

import pytest


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)
