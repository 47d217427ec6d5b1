import pytest
import torch
from mmengine.structures import BaseDataElement

from mmhdistill.models import FeatureHead


def test_predict__mean_patch_and_class_token():
    tokens = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    samples = [BaseDataElement(metainfo=dict(split='bank')), BaseDataElement(metainfo=dict(split='query'))]
    found = FeatureHead().predict((torch.zeros(2, 5, 3), tokens), samples)
    assert [sample.split for sample in found] == ['bank', 'query']
    # Rows of 3; patches are rows 1 to 4 of 5, whose mean is row 2.5.
    assert found[0].feature.tolist() == [7.5, 8.5, 9.5]
    assert found[1].feature.tolist() == [22.5, 23.5, 24.5]
    assert found[1].cls_feature.tolist() == [15, 16, 17]


def test_predict__without_class_token():
    tokens = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    found = FeatureHead(num_extra_tokens=0).predict((tokens, ))
    assert found[1].feature.tolist() == [16.5, 17.5, 18.5]
    assert 'cls_feature' not in found[1]


@pytest.mark.parametrize('shape', [(2, 3), (2, 3, 4, 4)])
def test_predict__other_backbone_outputs_are_refused(shape):
    with pytest.raises(ValueError, match=r"needs all tokens, \(B, N, C\), .*: give the backbone out_type='raw'"):
        FeatureHead().predict((torch.zeros(shape), ))
