"""The committed data card tells the truth about the demo's data set, which is generated anew here."""
from pathlib import Path
import pytest, yaml
from tmlab.demo import SCALES, make_replays
from tmlab.replays.card import card_numbers, check_card, write_card

MAY_DRIFT = ("fingerprint", "frames", "hours", "labelled_frames", "actions", "majority_share", "copy_last_share", "megabytes")  # with the last bit of another processor


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


def test_a_card_written_now_is_true_and_a_changed_number_is_noticed(numbers, tmp_path):
    root, found = numbers
    card = write_card(root, "demo", tmp_path / "demo.md")
    assert check_card(card, root) == []
    card.write_text(card.read_text().replace(f"frames: {found['frames']}", f"frames: {found['frames'] + 1}"))
    assert check_card(card, root)
