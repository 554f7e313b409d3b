"""The committed data card tells the truth about the demo's data set, which is generated anew here."""
from pathlib import Path
import numpy as np
import pytest, yaml
from tmlab.core.state import make_state
from tmlab.demo import SCALES, make_replays
from tmlab.replays.card import card_numbers, check_card, data_card, front_problems, write_card
from tmlab.replays.manifest import write_replay

MAY_DRIFT = ("fingerprint", "splits", "frames", "hours", "labelled_frames", "actions", "majority_share", "copy_last_share", "megabytes")  # with the last bit of another processor


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    make_replays(root, SCALES["smoke"])
    return root / "maps/img", card_numbers(root / "maps/img")


def test_committed_card_matches_the_generated_data(repo, numbers):
    stated = yaml.safe_load((repo / "data_cards/demo.md").read_text().split("---\n")[1])["tmlab"]
    root, found = numbers
    for key, value in found.items():
        if key not in MAY_DRIFT: assert stated[key] == value, key
    for key in ("frames", "hours", "labelled_frames", "majority_share", "copy_last_share", "megabytes"): assert stated[key] == pytest.approx(found[key], rel=0.01), key
    assert stated["actions"].keys() == found["actions"].keys()
    for split in ("train", "validation"):
        assert {k: stated["splits"][split][k] for k in ("tracks", "replays")} == {k: found["splits"][split][k] for k in ("tracks", "replays")}
    assert stated["splits"]["validation_tracks"] == found["splits"]["validation_tracks"]


def test_committed_cards_have_the_front_matter_and_sections_of_a_data_card(repo):
    cards = sorted((repo / "data_cards").glob("*.md"))
    assert cards
    for card in cards:
        text = card.read_text()
        assert front_problems(yaml.safe_load(text.split("---\n")[1])) == [], card
        sections = [line for line in text.splitlines() if line.startswith("## ")]
        assert sections == [f"## {s}" for s in ("Content", "Source and licence", "Actions", "Splits", "Statistics", "How it was made", "Known defects and limitations", "Versions")], card


@pytest.mark.parametrize("sources, licence, shown", [
    (["tmlab world v2"], "mit", "| tmlab world v2 | 1 | mit |"),
    (["tmlab world v2", "Replay.Gbx"], "unknown", "| Replay.Gbx | 1 | unknown |"),
    (["a|b\nc"], "unknown", "| a\\|b c | 1 | unknown |"),
    ([None], "unknown", "| not recorded | 1 | unknown |"),
    ([("a friend", "by letter of 2020")], "other", "| a friend | 1 | by letter of 2020 |"),
    (["tmlab world v2", ("a friend", "cc-by-4.0")], "other", "| a friend | 1 | cc-by-4.0 |")])
def test_a_licence_is_what_is_recorded_and_unknown_otherwise(tmp_path, sources, licence, shown):
    for i, s in enumerate(sources):
        source, recorded = s if isinstance(s, tuple) else (s, None)
        more = dict(license=recorded) if recorded else {}
        write_replay(tmp_path / f"img/t{i}/r", np.zeros((3, 8, 8), np.uint8), dict(time_ms=[0, 50, 100]), dict(frame_source="rendered", source=source, **more))
    text = data_card(tmp_path / "img", "x")
    assert yaml.safe_load(text.split("---\n")[1])["license"] == licence and shown in text
    assert ("ask the drivers" in text) == (licence == "unknown")


def test_known_defects_are_counted(tmp_path):
    t = np.array([0, 50, 150])
    states = make_state(3, time_ms=t, position=np.zeros((3, 3)))
    write_replay(tmp_path / "img/t/a", np.zeros((3, 8, 8), np.uint8), dict(time_ms=t, states=states, interpolated=[False, True, True]), dict(frame_source="game", race_finished=False))
    write_replay(tmp_path / "img/t/b", np.zeros((3, 9, 8), np.uint8), dict(time_ms=[0, 50, 100], action_idx=[0, 0, 0]), dict(frame_source="game"))
    text = data_card(tmp_path / "img", "x")
    for line in ("1 of 2 replays do not reach the finish", "Whether 1 of 2 replays finished is not recorded", "3 of 6 frames lie in replays that do not record every action", "3 of 6 frames have no state",
                 "2 of 6 states lie between two recorded samples", "Frames differ in size: 8x8, 8x9", "Frames were captured from the game"): assert line in text, line


def test_a_card_written_now_is_true_and_a_changed_number_is_noticed(numbers, tmp_path):
    root, found = numbers
    card = write_card(root, "demo", tmp_path / "demo.md")
    assert check_card(card, root) == []
    card.write_text(card.read_text().replace(f"frames: {found['frames']}", f"frames: {found['frames'] + 1}"))
    assert check_card(card, root)
