"""Planned batches of text: every sample once per pass, within the token limit, and reproducible."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.training.causal import batches

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(LENGTHS, st.integers(8, 512), st.booleans())
@settings(max_examples=200, deadline=None)
def test_an_evaluation_has_every_sample_once_within_the_limit(lengths, max_tokens, packing):
    found = batches.plan_eval_batches(lengths, max_tokens, packing)
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        sizes = [lengths[index] for index in group]
        tokens = sum(sizes) if packing else max(sizes) * len(sizes)
        assert tokens <= max_tokens or len(group) == 1


@given(LENGTHS, st.integers(8, 512))
@settings(max_examples=100, deadline=None)
def test_first_fit_leaves_no_space_that_a_later_bin_fits_in(lengths, max_tokens):
    found = batches.first_fit(lengths, range(len(lengths)), max_tokens)
    sums = [sum(lengths[index] for index in group) for group in found]
    for first in range(len(sums)):
        for second in range(first + 1, min(first + batches.OPEN_BINS, len(sums))):
            assert sums[first] + lengths[found[second][0]] > max_tokens


def plan(**changes):
    options = {"max_tokens": 100, "packing": True, "epochs": 2.0, "num_batches": 0, "multiple_of": 1, "seed": 0}
    return batches.plan_batches([7, 30, 55, 12, 90, 41, 3, 28] * 5, **options | changes)


def test_a_plan_depends_on_the_seed_alone():
    assert plan() == plan()
    assert plan() != plan(seed=1)


def test_epochs_are_passes_over_all_samples():
    indices = [index for group in plan(epochs=3.0) for index in group]
    assert sorted(indices) == sorted(list(range(40)) * 3)


def test_a_fraction_of_an_epoch_is_a_fraction_of_its_batches():
    whole, half = plan(epochs=1.0), plan(epochs=0.5)
    assert half == whole[: len(half)]
    assert abs(len(half) - len(whole) / 2) <= 1


def test_num_batches_overrides_epochs_and_batches_come_in_multiples():
    assert len(plan(num_batches=37)) == 37
    assert plan(num_batches=10) == plan(num_batches=37)[:10]
    assert len(plan(multiple_of=8)) % 8 == 0


def test_bins_are_nearly_full():
    lengths = [index % 97 + 4 for index in range(2000)]
    found = batches.first_fit(lengths, range(2000), 512)
    assert sum(lengths) / (512 * len(found)) > 0.97
