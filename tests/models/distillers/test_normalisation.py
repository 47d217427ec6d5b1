"""What the student's images are normalised by, as the teachers must know it."""
import re

import pytest

from tests.helpers import IMAGENET, build_distiller, log_messages


@pytest.mark.parametrize('values, message', [
    (dict(mean=[0.485, 0.456, 0.406], std=[0.25, 0.5, 0.125]),
     'data_preprocessor has mean 0.485, 0.456, 0.406 and std 0.25, 0.5, 0.125, as for images in 0-1: give mean and std '
     'of images in 0-255, 255 times as large.'),
    (dict(mean=[128.0], std=[64.0]),
     'data_preprocessor has mean [128.0] and std [64.0]: give three numbers each, for R, G and B.'),
])
def test_init__preprocessor_of_another_scale(values, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        build_distiller(data_preprocessor=dict(type='ImgDataPreprocessor', **values))


@pytest.mark.parametrize('given, warned', [(dict(bgr_to_rgb=True), 0), (dict(rgb_to_bgr=True), 0), ({}, 1),
                                           (dict(bgr_to_rgb=False), 1)])
def test_init__preprocessor_that_leaves_channels_as_they_are_is_told(given, warned):
    with log_messages() as messages:
        build_distiller(data_preprocessor=dict(type='ImgDataPreprocessor', **IMAGENET, **given))
    assert messages.count(
        'data_preprocessor does not turn BGR into RGB, and images are loaded as BGR by default: unless the pipeline '
        'loads RGB, teachers see the wrong channels; set bgr_to_rgb=True.') == warned
