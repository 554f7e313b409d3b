"""Roads under recorded lines: every line of the real data, the long ones and the one that crosses itself included."""
import numpy as np, pytest
from scipy.spatial import cKDTree
from tmlab.core.runs import real_data
from tmlab.tracks.line import ReferenceLine
from tmlab.tracks.track import Track, locate_on, pack

FILES = sorted(real_data("lines").glob("*.npy")) if real_data("lines") else []

@pytest.mark.skipif(not FILES, reason="no real data (lines); set TMLAB_REAL_DATA")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_metres_grow_along_a_recorded_line(file):
    line = ReferenceLine.load(file)
    track = Track.from_line(line)
    T, hint, found = pack([track]), 30, []
    for p in line.points:
        hint, *where = locate_on(T, 0, *p, hint)
        found.append(where)
    s, lateral, height = np.array(found).T
    assert all(np.isfinite(a).all() for a in track.arrays().values()) and np.isfinite(T.chunk_ball).all()
    assert (np.diff(s) > 0).all() and np.diff(s).max() < 3 and abs(s[0] - track.start_s) < .5 and abs(s[-1] - track.finish_s) < 1
    assert np.abs(lateral).max() < 1 and np.abs(height).max() < 1
    assert (np.diff(line.progress(line.points[1::7], line.s[1::7] + 3, 20)) > 0).all()

@pytest.mark.skipif(not FILES, reason="no real data (lines); set TMLAB_REAL_DATA")
def test_one_of_them_crosses_itself():
    "So the test above meets a place on two passages."
    def passages(file):
        p = ReferenceLine.load(file).points[::4, ::2]
        pairs = cKDTree(p).query_pairs(5.0, output_type="ndarray")
        return (np.abs(np.diff(pairs, axis=1)) > 60).sum()
    assert max(map(passages, FILES)) > 10

def test_a_line_that_passes_over_and_under_itself():
    "Two turns of a spiral, 6 m apart, and a flat eight: every point is found on its own passage."
    a = np.linspace(0, 4 * np.pi, 1500)
    for points in (np.column_stack([60 * np.cos(a), 6 * a / (2 * np.pi), 60 * np.sin(a)]), np.column_stack([60 * np.sin(a), 0 * a, 100 * np.sin(a / 2)])):
        track = Track.from_line(points)
        T, hint, s = pack([track]), 30, []
        for p in track.line.points:
            hint, metres, *_ = locate_on(T, 0, *p, hint)
            s.append(metres)
        assert (np.diff(s) > 0).all() and abs(s[-1] - track.finish_s) < 1
