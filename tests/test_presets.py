"""Presets: known names, fresh copies, and arguments the detectors take."""

from __future__ import annotations

import pytest

from rvae_fast.detector import AEDetector, RAEDetector, RVAEDetector, VAEDetector
from rvae_fast.presets import ENSEMBLES, PRESETS, preset


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - ENSEMBLES.keys()))
@pytest.mark.parametrize("detector", [AEDetector, RAEDetector, VAEDetector, RVAEDetector])
def test_every_preset_fits_every_detector(name, detector):
    parameters = preset(name)
    got = detector(**parameters).get_params()
    assert {k: got[k] for k in parameters} == parameters


def test_a_preset_is_a_copy():
    preset("image")["epochs"] = 1
    assert preset("image")["epochs"] == 200


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"name must be one of table, image, .*, image-two-rates, got 'audio'"):
        preset("audio")
