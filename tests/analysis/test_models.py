import numpy as np
import pytest
import torch
from PIL import Image

from mmhdistill.analysis.models import load_images, nmi_by_layer, precision_error, readouts, relation_distance
from mmhdistill.models import ViTTeacher
from tests.helpers import randomise, tiny_card


@pytest.fixture
def models():
    found = []
    for seed in range(2):
        model = ViTTeacher(tiny_card(mean=[0.0] * 3, std=[50.0] * 3), None, name=f'model {seed}',
                           input_mean=[0.0] * 3, input_std=[1.0] * 3)
        model.load()
        randomise(model, seed)
        found.append(model)
    return found


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_load_images__rgb_and_classes(tmp_path):
    for name, colour in (('a', (255, 0, 0)), ('b', (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 4, 3), colour, dtype=np.uint8)).save(tmp_path / name / '0.png')
    images, labels = load_images(tmp_path)
    assert images.shape == (2, 3, 4, 4)
    assert labels.tolist() == [0, 1]
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_readouts__by_hand_and_in_any_batches(models, images):
    with torch.no_grad():
        tokens = models[0].vit(images / 50.0)[0]
    for batch in (2, 5):
        found = readouts(models[0], images, batch)
        assert torch.allclose(found['patch'], tokens[:, 1:].mean(1), atol=1e-5)
        assert torch.allclose(found['cls'], tokens[:, 0], atol=1e-5)


def test_nmi_by_layer__zero_where_every_query_attends_alike(models, images):
    model = models[0]
    before = nmi_by_layer(model, images)
    with torch.no_grad():
        model.vit.layers[1].attn.qkv.weight[:32] = 0  # one query for all
    after = nmi_by_layer(model, images)
    assert after[1] == pytest.approx(0, abs=1e-6)
    assert before[1] > 1e-4
    assert after[0] == before[0]


def test_relation_distance__zero_only_to_itself(models, images):
    assert relation_distance(models[0], models[0], images, [(0, 0), (2, 2)]) == pytest.approx(0, abs=1e-6)
    pairs = [relation_distance(*models, images, [(layer, layer)]) for layer in (1, 2)]
    assert min(pairs) > 1e-3
    assert relation_distance(*models, images, [(1, 1), (2, 2)]) == pytest.approx(sum(pairs) / 2, rel=1e-5)


def test_precision_error__zero_only_in_the_same_precision(models, images):
    model, images = models[0], images.float()
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.attn.qkv.weight *= 8  # KL far above the rounding of its sums
    model.dtype = 'float16'
    assert precision_error(model, images, (4, 4), [0, 1], 'float32') == pytest.approx(
        dict(features=0, relations=0), abs=1e-6)
    found = precision_error(model, images, (4, 4), [0, 1])
    assert model.dtype == 'float16'
    model.dtype = 'float32'
    exact = model(images, (4, 4), {0: frozenset('qk'), 1: frozenset('qk'), 2: frozenset({'features'})})
    model.dtype = 'bfloat16'
    half = model(images, (4, 4), {0: frozenset('qk'), 1: frozenset('qk'), 2: frozenset({'features'})})
    x, y = (output.patches(2, 'features').float() for output in (exact, half))
    assert found['features'] == pytest.approx(((x - y).norm(dim=-1) / x.norm(dim=-1)).mean().item(), rel=1e-5)
    heads, kl = model.spec.num_heads, 0
    for layer in (0, 1):
        p, q = ((output.patches(layer, 'q').double().unflatten(2, (heads, -1)).transpose(1, 2)
                 @ output.patches(layer, 'k').double().unflatten(2, (heads, -1)).permute(0, 2, 3, 1)
                 / (model.spec.embed_dims / heads)**0.5).log_softmax(-1) for output in (exact, half))
        kl += (p.exp() * (p - q)).sum(-1).mean().item() / 2
    assert kl > 1e-3
    assert found['relations'] == pytest.approx(kl, rel=1e-4)
    assert found['features'] > 1e-4
