import shutil

import mmhdistill.engine.checkpoints as checkpoints
from tests.engine.resumable import last, output, run, validated


def fill_the_disk_for_best_ones(rank):
    """From the second on."""
    write = checkpoints.write_checkpoint

    def full(path, data):
        if path.name in ('best_score_epoch_2.pth', 'best_score_epoch_3.pth'):
            raise OSError(28, 'No space left on device')
        write(path, data)

    checkpoints.write_checkpoint = full


def test_save_best__disk_full_leaves_the_best_one_that_is_on_disk(tmp_path):
    settings = validated(tmp_path)
    settings['default_hooks']['checkpoint'].update(published_keys=['meta', 'state_dict'])
    assert run(tmp_path, before=fill_the_disk_for_best_ones, **settings) == [0], output(tmp_path)
    assert 'checkpoint the best one could not be written ([Errno 28] No space left on device)' in output(tmp_path)
    assert last(tmp_path)['meta']['epoch'] == 3
    known = last(tmp_path)['message_hub']['runtime_info']
    assert known['best_score'] == 7 and known['best_ckpt'] == str(tmp_path / 'best_score_epoch_1.pth')
    published = [path.stem.rpartition('-')[0] for path in tmp_path.glob('*-*.pth')]
    assert sorted(published) == ['best_score_epoch_1', 'epoch_3']
    whole = {path.stem for path in tmp_path.glob('*.pth')} - {path.stem for path in tmp_path.glob('*-*.pth')}
    assert whole == {'best_score_epoch_1', 'epoch_1', 'epoch_2', 'epoch_3'}
    # With room again it is beaten by the next one.
    settings = validated(tmp_path)
    settings['train_cfg']['max_epochs'] = 4
    assert run(tmp_path, **settings) == [0], output(tmp_path)
    known = last(tmp_path)['message_hub']['runtime_info']
    assert known['best_score'] == 28 and known['best_ckpt'] == str(tmp_path / 'best_score_epoch_4.pth')
    assert not (tmp_path / 'best_score_epoch_1.pth').exists()


def test_save_best__a_copied_folder_leaves_the_original_alone(tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    settings = validated(one)
    settings['train_cfg']['max_epochs'] = 1
    assert run(one, **settings) == [0], output(one)
    shutil.copytree(one, two)
    best = two / 'best_score_epoch_1.pth'
    assert best.exists()
    assert run(two, **validated(two)) == [0], output(two)
    assert (one / best.name).exists() and not best.exists()
    assert last(two)['message_hub']['runtime_info']['best_ckpt'] == str(two / 'best_score_epoch_3.pth')
