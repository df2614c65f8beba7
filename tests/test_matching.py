"""Carriers paired with a suspect's tensors: by shape and order, never by name, with every choice counted."""

import math

import numpy as np

from wmengine.parts.matching import MAXIMUM_TRIES, fitted, match_tensors
from wmengine.suspects.base import Tensor


def tensors(*shapes):
    return [Tensor(np.zeros(shape, np.float32), f"weight {index}") for index, shape in enumerate(shapes)]


def test_as_many_tensors_as_carriers_are_one_free_pairing_in_order():
    matching = match_tensors([(8, 4, 3, 3), (10, 8), (8, 4, 3, 3)], tensors((8, 4, 3, 3), (8, 4, 3, 3), (10, 8)))
    assert matching.tries == ((0, 2, 1),)
    assert (matching.found, matching.possible) == (3, 1)
    assert [str(each) for each in matching.facts] == [
        "3 of 3 carriers matched to the suspect's tensors by shape and order"
    ]


def test_more_or_fewer_tensors_than_carriers_are_tries_that_keep_the_order():
    more = match_tensors([(4, 3), (4, 3)], tensors((4, 3), (4, 3), (4, 3)))
    assert set(more.tries) == {(0, 1), (0, 2), (1, 2)}
    fewer = match_tensors([(4, 3)] * 3, tensors((4, 3), (5, 3), (4, 3)))
    assert set(fewer.tries) == {(0, 2, None), (0, None, 2), (None, 0, 2)}
    assert (more.found, fewer.found, fewer.possible) == (2, 2, 3)
    assert str(fewer.facts[1]) == ("3 of the 3 possible orders of tensors of equal shape were tried and paid for")


def test_choices_of_several_shapes_multiply_up_to_the_cap():
    shapes = [(4, 3), (5, 3)]
    both = match_tensors(shapes, tensors((4, 3), (5, 3), (4, 3), (5, 3)))
    assert len(set(both.tries)) == both.possible == 4
    crowd = match_tensors([(4, 3)] * 20 + [(5, 3)], tensors(*[(4, 3)] * 40, (5, 3), (5, 3)))
    assert crowd.possible == 2 * math.comb(40, 20)
    assert len(set(crowd.tries)) == len(crowd.tries) == MAXIMUM_TRIES
    assert all(pairing == tuple(sorted(pairing[:20])) + pairing[20:] for pairing in crowd.tries)
    assert f"{MAXIMUM_TRIES} of the {crowd.possible} possible orders" in str(crowd.facts[1])


def test_thousands_of_carriers_of_one_shape_have_more_orders_than_are_written_out():
    many = match_tensors([(1, 1)] * 8000, tensors((1, 1)) * 24000)
    assert (many.found, len(many.tries)) == (8000, MAXIMUM_TRIES)
    assert f"{MAXIMUM_TRIES} of the 10^6632 possible orders" in str(many.facts[1])


def test_a_network_inside_a_larger_one_is_among_the_first_tries():
    """Its layers are all there in a row, before, between or behind others of their shapes."""
    shapes = [(4, 3)] * 5 + [(5, 3)] * 4
    larger = match_tensors(shapes, tensors(*[(4, 3)] * 9, *[(5, 3)] * 9))
    assert larger.possible == math.comb(9, 5) * math.comb(9, 4) > MAXIMUM_TRIES
    for first in range(5):
        for second in range(6):
            row = (*range(first, first + 5), *range(9 + second, 9 + second + 4))
            assert row in larger.tries


def test_the_recorded_places_are_tried_first_where_they_fit():
    many = tensors(*[(4, 3)] * 80)
    recorded = match_tensors([(4, 3)], many, [70])
    plain = match_tensors([(4, 3)], many)
    assert recorded.tries == ((70,), *plain.tries)
    assert recorded.possible == plain.possible == 80
    known = match_tensors([(4, 3)], many[:5], [2])
    assert known.tries == ((2,), (0,), (1,), (3,), (4,))
    assert match_tensors([(4, 3)], tensors((5, 3), (4, 3)), [1]).tries == ((1,),)
    for misplaced in ([0], [2]):  # another shape there, and nothing there
        assert match_tensors([(4, 3)], tensors((5, 3), (4, 3)), misplaced).tries == ((1,),)
    half = match_tensors([(4, 3), (4, 3)], tensors((4, 3), (5, 3), (4, 3), (4, 3)), [0, 1])
    assert half.tries == match_tensors([(4, 3), (4, 3)], tensors((4, 3), (5, 3), (4, 3), (4, 3))).tries


def test_other_shapes_do_not_match_not_even_transposed():
    matching = match_tensors([(8, 4, 3, 3), (10, 8)], tensors((8, 4, 5, 5), (8, 10), (4, 8, 3, 3)))
    assert (matching.found, matching.tries) == (0, ((None, None),))
    assert match_tensors([(8, 4)], []).found == 0


def test_axes_of_length_one_are_overlooked_only_where_a_shape_is_missing():
    """A Linear rewritten as a 1x1 convolution is found; beside a Linear of its own shape it is not tried."""
    assert match_tensors([(8, 4)], tensors((8, 4, 1, 1))).tries == ((0,),)
    assert match_tensors([(8, 4, 3)], tensors((8, 4, 1, 3))).tries == ((0,),)
    assert match_tensors([(8, 4)], tensors((8, 4, 1, 1), (8, 4))).tries == ((1,),)
    assert match_tensors([(8, 1)], tensors((8, 1, 1, 1))).tries == ((0,),)
    mixed = match_tensors([(8, 4), (8, 4, 1, 1)], tensors((8, 4, 1, 1), (8, 4, 1, 1)))
    assert mixed.tries == ((0, 1),)


def values_of(shapes, found):
    (pairing,) = match_tensors(shapes, found).tries
    return [found[place].values for place in pairing]


def test_queries_keys_and_values_may_be_packed_or_apart():
    """Two blocks of attention: three projections or one, and that of the output."""
    apart, packed = [(4, 4)] * 8, [(12, 4), (4, 4)] * 2
    parts = [Tensor(np.full((4, 4), number, np.float32), str(number)) for number in range(8)]
    wholes = [
        Tensor(np.concatenate([part.values for part in parts[start : start + count]]), str(start))
        for start, count in [(0, 3), (3, 1), (4, 3), (7, 1)]
    ]
    for shapes, tensors_, expected in ((apart, wholes, parts), (packed, parts, wholes), (packed, wholes, wholes)):
        for ours, theirs in zip(values_of(shapes, fitted(shapes, tensors_)), expected, strict=True):
            assert np.array_equal(ours, theirs.values)
    assert fitted([(12, 4)], parts) == parts  # which of them?
    assert fitted([(4, 4)] * 2, wholes[1:2] * 2 + wholes[:1]) == wholes[1:2] * 2 + wholes[:1]  # none is missing


def test_without_a_graph_both_orders_are_tried():
    def stored(name, place):
        return Tensor.unread((4, 3), name, lambda: None, place)

    listed = [stored("layer1", 0), stored("layer10", 2), stored("layer2", 1)]
    assert match_tensors([(4, 3)] * 3, listed).tries == ((0, 1, 2), (0, 2, 1))
    assert match_tensors([(4, 3)] * 3, [stored("a", 0), stored("b", 1), stored("c", 2)]).tries == ((0, 1, 2),)
    many = match_tensors([(4, 3)] * 2, [stored(str(number), 80 - number) for number in range(80)])
    assert len(many.tries) <= MAXIMUM_TRIES
    assert {many.tries[0], many.tries[-1]} >= {(0, 1)}
    assert (79, 78) in many.tries


def test_recorded_names_are_tried_first_and_paid_where_no_graph_tells_the_order():
    """Behind a prefix, too, which is the same for all of them."""
    shapes = [(4, 3), (4, 3), (5, 4)]

    def listed(*names, graph=False):
        sizes = [(5, 4) if name.endswith("out") else (4, 3) for name in names]
        return [
            Tensor.unread(size, f"{name}.weight", lambda: None, None if graph else place)
            for place, (name, size) in enumerate(zip(names, sizes, strict=True))
        ]

    names = ("second", "first", "out")
    plain = ("first", "second", "out")
    assert match_tensors(shapes, listed(*plain), None, names).tries == ((1, 0, 2), (0, 1, 2))
    assert match_tensors(shapes, listed("a.first", "b.second", "b.first", "b.out"), None, names).tries[0] == (1, 2, 3)
    for other in (listed(*plain, graph=True), listed("first", "third", "out"), listed("out", "xsecond", "first")):
        assert match_tensors(shapes, other, None, names).tries == match_tensors(shapes, other).tries
