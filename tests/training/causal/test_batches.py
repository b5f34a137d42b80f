"""Batches of text, planned: nothing lost, nothing twice, room kept, the same again from the same seed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.training.causal import batches

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(LENGTHS, st.integers(8, 512), st.sampled_from(["packed", "padded"]))
@settings(max_examples=200, deadline=None)
def test_one_pass_has_every_row_once_within_the_room(lengths, room, layout):
    found = batches.plan_eval_batches(lengths, room, layout)
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        held = [lengths[index] for index in group]
        taken = sum(held) if layout == "packed" else max(held) * len(held)
        assert taken <= room or len(group) == 1


@given(LENGTHS, st.integers(8, 512))
@settings(max_examples=100, deadline=None)
def test_no_two_bins_that_were_open_together_fit_into_one(lengths, room):
    found = batches.first_fit(lengths, range(len(lengths)), room)
    sums = [sum(lengths[index] for index in group) for group in found]
    for first in range(len(sums)):
        for second in range(first + 1, min(first + batches.OPEN_BINS, len(sums))):
            assert sums[first] + lengths[found[second][0]] > room


def a_plan(**how):
    settings = {"room": 100, "layout": "packed", "epochs": 2.0, "count": 0, "multiple": 1, "seed": 0} | how
    return batches.plan_batches([7, 30, 55, 12, 90, 41, 3, 28] * 5, **settings)


def test_a_plan_is_the_same_from_the_same_seed_and_another_from_another():
    assert a_plan() == a_plan()
    assert a_plan() != a_plan(seed=1)


def test_epochs_are_passes_over_all_rows():
    seen = [index for group in a_plan(epochs=3.0) for index in group]
    assert sorted(seen) == sorted(list(range(40)) * 3)


def test_a_part_of_an_epoch_is_a_part_of_its_batches():
    whole, half = a_plan(epochs=1.0), a_plan(epochs=0.5)
    assert half == whole[: len(half)]
    assert abs(len(half) - len(whole) / 2) <= 1


def test_steps_go_before_epochs_and_batches_come_in_multiples():
    assert len(a_plan(count=37)) == 37
    assert a_plan(count=10) == a_plan(count=37)[:10]
    assert len(a_plan(multiple=8)) % 8 == 0


def test_bins_are_nearly_full():
    lengths = [index % 97 + 4 for index in range(2000)]
    found = batches.first_fit(lengths, range(2000), 512)
    assert sum(lengths) / (512 * len(found)) > 0.97
