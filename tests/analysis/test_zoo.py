import pytest
import torch
from mmengine.config import Config

from mmhdistill.analysis.zoo import load_model
from mmhdistill.models import find_card
from mmhdistill.models.vit import encode
from mmhdistill.registry import MODELS
from tests.helpers import tiny_card

QUICKSTART = 'mmhdistill::quickstart/hdistill_vit-photos.py'


def test_load_model__checkpoint_sees_normalised_images(checkpoint, images):
    path, distiller = checkpoint
    model = load_model(str(path))
    assert (model.name, model.image_size, model.spec.depth) == (f'{path.parent.name}/epoch_1', 32, 3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([100.0, 110.0, 120.0], [50.0, 55.0, 60.0]))
    taps = {2: frozenset({'features'})}
    distiller.eval()
    with torch.no_grad():
        want = encode(distiller.backbone, (images - mean) / std, taps).taps[2, 'features']
    torch.testing.assert_close(model.run(images, taps).taps[2, 'features'], want)


@pytest.mark.parametrize('kind, fields, beside', [
    ('MAEViT', dict(mask_ratio=0.5), True), ('mmpretrain.MoCoV3ViT', {}, False)])
def test_load_model__encoder_of_a_method_of_mmpretrain(kind, fields, beside, images, tmp_path):
    """With data_preprocessor in the model, or beside it, as in configs of mmpretrain."""
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=96)
    backbone = dict(type=kind, img_size=32, patch_size=8, arch=arch, **fields)
    torch.manual_seed(0)
    encoder = MODELS.build({**backbone, 'type': 'mmpretrain.' + kind.split('.')[-1]})
    encoder.init_weights()
    encoder.eval()
    mean, std = [100.0, 110.0, 120.0], [50.0, 55.0, 60.0]
    cfg = Config(dict(model=dict(type='MAE', backbone=backbone, neck=dict(type='x'))))
    (cfg if beside else cfg.model).data_preprocessor = dict(mean=mean, std=std)
    state = {f'backbone.{name}': x for name, x in encoder.state_dict().items()}
    torch.save(dict(state_dict={**state, 'neck.weight': torch.zeros(2)}, meta=dict(cfg=cfg.pretty_text)),
               tmp_path / 'epoch_9.pth')
    model = load_model(f'mine:{tmp_path}/epoch_9.pth')
    assert (model.name, model.image_size, model.spec.num_heads) == ('mine', 32, 4)
    inputs = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        want = encoder(inputs, mask=None) if kind == 'MAEViT' else encoder(inputs)
    found = model.run(images, {2: frozenset({'features'})}).taps[2, 'features']
    torch.testing.assert_close(found if kind == 'MAEViT' else found[:, 0], want[0])


def test_load_model__config_card_and_label(images):
    model = load_model(f'a student:{QUICKSTART}')
    assert (model.name, model.image_size, model.spec.embed_dims) == ('a student', 32, 64)
    assert model.settings['model']['masker']['teacher'] == 'mae'
    # Mean and std of the config: grey images of its mean are zeros to it.
    taps = {0: frozenset({'q'})}
    grey = model.run(torch.full((1, 3, 32, 32), 120.0), taps).taps[0, 'q'][:, 1:]
    zeros = load_model(QUICKSTART).run(torch.zeros(1, 3, 32, 32) + 120, taps).taps[0, 'q'][:, 1:]
    assert grey.shape == zeros.shape == (1, 64, 64)
    card = load_model('deit-vit-ti-p16=None')
    assert (card.name, card.image_size, card.spec.depth, card.spec.patch_size) == ('deit-vit-ti-p16', 224, 12, 16)


def test_load_model__card_whose_patches_do_not_fill_its_image(monkeypatch):
    tiny = tiny_card(name='odd', img_size=34)
    monkeypatch.setattr('mmhdistill.analysis.zoo.find_card', lambda name: find_card(tiny))
    model = load_model('odd=None')
    assert (model.image_size, model.spec.patch_size) == (32, 8)
    assert model.run(torch.zeros(1, 3, 32, 32), {0: frozenset('q')}).grid == (4, 4)


@pytest.mark.parametrize('text, error', [
    ('deit-vit-tiny', "unknown teacher card 'deit-vit-tiny'"),
    ('none/epoch_1.pth', 'none/epoch_1.pth does not exist'),
    ('mmhdistill::quickstart/none.py', "config 'mmhdistill::quickstart/none.py' is not in mmhdistill"),
    ('empty.pth', 'weight file empty.pth cannot be read: it is damaged'),
    ('text.pth', 'weight file text.pth cannot be read: it is damaged'),
    ('words.pth', 'words.pth holds no tensors'),
    ('broken.py', "broken.py is no config: .*line 2"),
    ('mine:', "unknown teacher card 'mine:'"),
])
def test_load_model__what_is_not_there(text, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty.pth').touch()
    (tmp_path / 'text.pth').write_text('not a weight file')
    torch.save(dict(a=1), 'words.pth')
    (tmp_path / 'broken.py').write_text('model = dict(\n  a=)')
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_model(text)


@pytest.mark.parametrize('folder', ['lr=0.1', 'a:b', 'no-dot'])
def test_load_model__paths_that_look_like_something_else(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / folder / ('epoch_1' if folder == 'no-dot' else 'epoch_1.pth')
    path.parent.mkdir()
    path.write_bytes(checkpoint[0].read_bytes())
    for text in (str(path), f'{folder}/{path.name}'):
        assert load_model(text).name == f'{folder}/epoch_1'
    assert load_model(f'mine:{path}').name == 'mine'


def test_load_model__checkpoint_without_a_config(checkpoint, images, tmp_path):
    path, config = tmp_path / 'student.pth', tmp_path / 'config.py'
    content = torch.load(checkpoint[0])
    config.write_text(content['meta']['cfg'])
    torch.save(dict(state_dict=content['state_dict']), path)
    with pytest.raises(ValueError, match=f'keeps no config.* CONFIG.py={path}'):
        load_model(str(path))
    taps = {2: frozenset({'features'})}
    found = load_model(f'{config}={path}').run(images, taps).taps[2, 'features']
    assert torch.equal(found, load_model(str(checkpoint[0])).run(images, taps).taps[2, 'features'])
