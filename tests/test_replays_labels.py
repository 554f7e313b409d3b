"Labels of 50 ms decisions from 10 ms inputs, and the 184 floats of recorded runs against the truth."
import numpy as np
import pytest
from tmlab.replays.actions import (ACTIONS, DEAD_ZONE, class_controls, class_keys, class_names, continuous_labels, hard_labels, input_controls, label_ticks,
                                   nearest_action, soft_labels, tick_classes)
from tmlab.replays.gbx import ghost_keys, ghost_steer, read_gbx
from tmlab.replays.scripts import ghost_ticks, read_script, script_ticks


def plain_labels(controls, classes):
    "Hard and soft labels by counting, one decision after the other."
    each, hard, soft = tick_classes(controls, classes).tolist(), [], []
    for k in range(0, len(each), 5):
        part = each[k:k + 5]
        hard.append(max(dict.fromkeys(part), key=part.count))  # the first of equally frequent ones, in order of appearance
        soft.append([part.count(c) / len(part) for c in range(classes)])
    return np.array(hard, int), np.array(soft).reshape(-1, classes)


@pytest.mark.parametrize("classes", [9, 12, 27])
def test_labels_agree_with_counting(classes):
    rng = np.random.default_rng(classes)
    for n in (0, 1, 4, 5, 6, 173):
        for x in (rng.random((n, 4)) < .5, np.c_[rng.uniform(-1, 1, n), rng.choice([0, .4, .6, 1], (n, 2))]):
            hard, soft = plain_labels(x, classes)
            assert np.array_equal(hard_labels(x, classes), hard) and np.allclose(soft_labels(x, classes), soft)
            assert len(continuous_labels(x)) == len(hard) == -(-n // 5)


@pytest.mark.parametrize("classes", [9, 12, 27])
def test_classes_there_and_back(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 100)
    ticks = label_ticks(labels, classes)
    assert np.array_equal(hard_labels(ticks, classes), labels) and np.array_equal(soft_labels(ticks, classes), np.eye(classes)[labels])
    assert np.array_equal(continuous_labels(ticks), class_controls(classes)[labels].astype(np.float32))
    if classes < 27: assert np.array_equal(hard_labels(class_keys(classes)[labels].repeat(5, 0), classes), labels)
    assert len(class_names(classes)) == classes == len(set(class_names(classes)))


def test_each_number_of_classes_begins_with_the_smaller_one():
    assert np.array_equal(class_controls(27)[:12], class_controls(12)) and np.array_equal(class_controls(12)[:9], class_controls(9))
    keys = np.random.default_rng(1).random((400, 4)) < .5
    assert np.array_equal(tick_classes(keys, 27), nearest_action(keys)) and np.array_equal(tick_classes(keys, 12), nearest_action(keys))
    nine = tick_classes(keys, 9)
    assert np.array_equal(nine[~(keys[:, 0] & keys[:, 1])], nearest_action(keys)[~(keys[:, 0] & keys[:, 1])])
    assert (class_keys(9)[nine, 1] == keys[:, 1]).all() and not class_keys(9)[:, :2].all(1).any()


def test_a_dead_zone_and_thirds():
    steer = np.array([-1, -1.01 * DEAD_ZONE, -.99 * DEAD_ZONE, 0, .99 * DEAD_ZONE, 1.01 * DEAD_ZONE])
    for n in (9, 12, 27): assert class_controls(n)[tick_classes(np.c_[steer, steer * 0, steer * 0], n), 0].tolist() == [-1, -1, 0, 0, 0, 1]
    gas = np.array([0, .3, .34, .5, .51, .66, .67, 1])
    assert class_controls(27)[tick_classes(np.c_[gas * 0, gas, gas * 0], 27), 1].tolist() == [0, 0, .5, .5, .5, .5, 1, 1]
    assert class_controls(12)[tick_classes(np.c_[gas * 0, gas * 0, gas], 12), 2].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("bad, words", [(np.zeros((3, 5)), "shape"), (np.zeros(4), "shape"), ([[2, 0, 0.]], "outside"), ([[0, -.5, 0]], "outside"), ([[np.nan, 0, 0]], "not finite")])
def test_what_is_no_input_is_refused(bad, words):
    with pytest.raises(ValueError, match=words): hard_labels(bad)


def test_a_number_of_classes_that_there_is_not():
    with pytest.raises(ValueError, match="8 classes"): hard_labels(ACTIONS, 8)


@pytest.mark.real
@pytest.mark.parametrize("classes", [9, 12, 27])
def test_scripts_and_their_replays_have_the_same_labels(real, classes):
    pair = real("input_scripts", "EddyS999_WHI_24540.inputs"), real("replays", "stadium", "A01-Race_24540_akira.Replay.Gbx")
    ghost = read_gbx(pair[1]).best
    a, b = input_controls(*script_ticks(read_script(pair[0]), ghost.race_time_ms)), input_controls(*ghost_ticks(ghost))
    assert np.array_equal(hard_labels(a, classes), hard_labels(b, classes)) and np.array_equal(continuous_labels(a), continuous_labels(b))
    times = np.arange(0, ghost.race_time_ms, 10)
    assert np.array_equal(tick_classes(b), nearest_action(ghost_keys(ghost, times))) and np.array_equal(b[:, 0], ghost_steer(ghost, times))
    assert np.array_equal(soft_labels(a, classes).sum(1), np.ones(len(times) // 5 + (len(times) % 5 > 0), np.float32))
