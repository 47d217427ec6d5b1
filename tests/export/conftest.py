"""A distiller's checkpoint as a Runner writes it, and every library's own way to read an export."""
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmhdistill.registry import MODELS
from tests.helpers import IMAGENET, randomise, tiny_student

PREPROCESSOR = dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **IMAGENET)


@pytest.fixture
def make(tmp_path):
    """Writes ``epoch_2.pth`` and returns its path and the student in it."""

    def make(preprocessor=PREPROCESSOR, meta=None, **backbone):
        cfg = tiny_student(**backbone)
        student = randomise(MODELS.build(cfg))
        student.pos_embed.data.normal_(generator=torch.Generator().manual_seed(1))
        student.eval()
        tensors = {f'backbone.{name}': x for name, x in student.state_dict().items()}
        tensors['losses.feature.projector.weight'] = torch.ones(2, 2)
        text = Config(dict(model=dict(type='mmhdistill.HybridDistiller', backbone=cfg,
                                      data_preprocessor=preprocessor))).pretty_text
        meta = dict(cfg=text, epoch=2, iter=8, experiment_name='tiny_20260102_030405') if meta is None else meta
        torch.save(dict(state_dict=tensors, meta=meta, optimizer={}), tmp_path / 'epoch_2.pth')
        return tmp_path / 'epoch_2.pth', student

    return make


def student_features(student, images):
    """By the walk that the losses use, which resamples positions itself."""
    last = student.spec.depth - 1
    with torch.no_grad():
        return student.encode(images, {last: frozenset({'features'})}).taps[last, 'features']


def manifest_of(out: Path) -> dict:
    return json.loads(out.with_name(f'{out.name}.json').read_text())


@torch.no_grad()
def native_features(target: str, out: Path, images):
    """Features by the library's own model, loaded strictly from what was written."""
    return _READERS[target](out, manifest_of(out), images)


def _mmpretrain(out, manifest, images):
    from mmpretrain.registry import MODELS
    vit = MODELS.build(manifest['architecture'])
    state = torch.load(out, weights_only=True)['state_dict']
    assert state['pos_embed'].shape == vit.pos_embed.shape  # else mmpretrain resamples it, strict or not
    vit.load_state_dict(state, strict=True)
    vit.eval()
    return vit(images)[0]


def _timm(out, manifest, images):
    import timm
    model = timm.create_model(**manifest['timm'], checkpoint_path=str(out)).eval()
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data['input_size']) == (3, *images.shape[-2:])
    for name in ('mean', 'std'):
        assert [255 * x for x in data[name]] == pytest.approx(manifest['normalisation'][name])
    return model(images)


def _huggingface(out, manifest, images):
    from transformers import ViTImageProcessor, ViTModel
    model, info = ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randint(256, (3, *images.shape[-2:]), dtype=torch.uint8)
    seen = ViTImageProcessor.from_pretrained(out)(pixels, return_tensors='pt')['pixel_values'][0]
    mean, std = (torch.tensor(manifest['normalisation'][name]).view(3, 1, 1) for name in ('mean', 'std'))
    assert torch.allclose(seen, (pixels - mean) / std, atol=1e-5)
    return model.eval()(images).last_hidden_state


def _torch(out, manifest, images):
    return torch.export.load(out).module()(images)


def _onnx(out, manifest, images):
    import onnx
    import onnxruntime
    onnx.checker.check_model(str(out), full_check=True)
    session = onnxruntime.InferenceSession(str(out), providers=['CPUExecutionProvider'])
    features, = session.run(['features'], {'images': images.numpy()})
    return torch.from_numpy(features)


_READERS = dict(mmpretrain=_mmpretrain, timm=_timm, huggingface=_huggingface, torch=_torch, onnx=_onnx)
