"""Clips of a film stay inside their shots; checked on a film that the test writes."""

import cv2
import numpy as np
import pytest

from adamac.embedded.training import film


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Twelve shots of thirty frames, each in its own gray with a moving bar."""
    path = tmp_path_factory.mktemp("film") / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 24, (96, 56))
    for shot in range(12):
        for t in range(30):
            frame = np.full((56, 96, 3), 60 + 120 * (shot % 2) + 3 * shot, np.uint8)
            frame[:, t : t + 4] = 0
            writer.write(frame)
    writer.release()
    return film.load(path, 32, 48)


def test_all_cuts_are_found(synthetic):
    assert [s.start for s in synthetic.shots] == list(range(0, 360, 30))


def test_clips_never_cross_a_cut(synthetic):
    for frames, _ in synthetic.clips(np.random.default_rng(0), 60, 13):
        assert not film.find_cuts(frames)


def test_held_out_shots_are_kept_apart(synthetic):
    held_out = {s.start for s in synthetic.shots if s.held_out}
    assert held_out
    assert len(held_out) < len(synthetic.shots) / 4


def test_a_shot_too_short_is_named(synthetic):
    with pytest.raises(ValueError, match="at least 500 frames"):
        synthetic.clips(np.random.default_rng(0), 1, 500)
