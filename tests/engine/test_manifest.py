import hashlib
import subprocess

import pytest

from mmhdistill.engine.manifest import differences, fingerprint, git_state


def manifest(**config):
    return dict(config=config, versions=dict(torch='2.13.0'), git=None, teachers={},
                data=dict(type='ImageFolder', count=10, names='ab'),
                seeds=dict(seed=0, diff_rank_seed=True, processes=8))


def receipt(**kwargs):
    return {**dict(role='teacher', model='mae-vit-b-p16', sha256='00', dtype='float32', mean=[0.0], std=[1.0],
                   source='a.pth', run=dict(share=0.5)), **kwargs}


def test_differences__of_a_run_with_itself_elsewhere():
    start = dict(init_cfg=dict(checkpoint=1))
    before = manifest(work_dir='a', resume=False, launcher='none', model=dict(pretrained='a.pth', backbone=start))
    now = manifest(work_dir='b', resume=True, launcher='pytorch', load_from='c.pth',
                   model=dict(pretrained='/data/a.pth', backbone=dict()))
    before['teachers'], now['teachers'] = dict(mae=receipt()), dict(mae=receipt(source='b.pth', run={}))
    assert differences(before, now) == dict(student=[], teachers=[], losses=[], rest=[])


@pytest.mark.parametrize('key', ['model', 'sha256', 'dtype', 'mean', 'std'])
def test_differences__of_a_teacher(key):
    before, now = manifest(), manifest()
    before['teachers'], now['teachers'] = dict(mae=receipt()), dict(mae=receipt(**{key: 'other'}))
    before['teachers']['backbone'] = receipt(role='student')
    found = differences(before, now)
    assert found.pop('teachers') == [f"teacher mae.{key}: {receipt()[key]!r} -> 'other'"]
    assert list(found.values()) == [[], [], []]


def test_differences__a_teacher_more_and_one_of_another_kind():
    before = manifest(model=dict(teachers=dict(clip=dict(type='ViTTeacher', checkpoint='a.pth'))))
    now = manifest(model=dict(teachers=dict(clip=dict(type='TimmTeacher', checkpoint='b.pth'))))
    now['teachers'] = dict(mae=receipt())
    found = differences(before, now)['teachers']
    assert found[0] == "model.teachers.clip.type: 'ViTTeacher' -> 'TimmTeacher'"
    assert found[1:] == [f'teacher mae.{key}: absent -> {receipt()[key]!r}'
                         for key in ('model', 'sha256', 'dtype', 'mean', 'std')]


def test_differences__versions_data_seeds_and_git_are_of_the_rest():
    now = manifest(param_scheduler=[dict(end=5), dict(begin=5)])
    now.update(versions=dict(torch='2.12.0'), git=dict(commit='c0', changed=False))
    now['data'].update(count=11)
    now['seeds'].update(processes=4)
    before = manifest(param_scheduler=[dict(end=4), dict(begin=5)])
    assert differences(before, now)['rest'] == [
        'param_scheduler.0.end: 4 -> 5', "versions torch: '2.13.0' -> '2.12.0'", 'data count: 10 -> 11',
        'seeds processes: 8 -> 4', "git commit: absent -> 'c0'", 'git changed: absent -> False']


def test_differences__how_a_model_is_computed_and_tested_is_of_the_rest():
    before = manifest(model=dict(backbone=dict(with_cp=False), teachers=dict(clip=dict(type='ViTTeacher')),
                                 test_cfg=dict(rcnn=dict(score_thr=0.05))))
    now = manifest(model=dict(backbone=dict(with_cp=True), teachers=dict(clip=dict(type='ViTTeacher', compile=True)),
                              test_cfg=dict(rcnn=dict(score_thr=0.1))))
    assert differences(before, now) == dict(student=[], teachers=[], losses=[], rest=[
        'model.backbone.with_cp: False -> True', 'model.test_cfg.rcnn.score_thr: 0.05 -> 0.1',
        'model.teachers.clip.compile: absent -> True'])


def test_differences__options_of_the_checkpoint_hook_are_told():
    before, now = (manifest(default_hooks=dict(checkpoint=dict(interval=interval))) for interval in (1, 5))
    assert differences(before, now)['rest'] == ['default_hooks.checkpoint.interval: 1 -> 5']


def dataset(names):
    return type('Files', (list, ), dict(get_data_info=lambda self, i: dict(img_path=self[i])))(names)


def test_fingerprint__names_and_count_not_where_they_lie():
    found = fingerprint(dataset(['/data/a/1.png', '/data/b/2.png']))
    assert found == dict(type='Files', count=2, names=hashlib.sha256(b'a/1.png\nb/2.png').hexdigest())
    assert fingerprint(dataset(['/elsewhere/a/1.png', '/elsewhere/b/2.png'])) == found
    assert fingerprint(dataset(['/data/a/1.png', '/data/b/3.png']))['names'] != found['names']
    assert fingerprint([0, 1, 2]) == dict(type='list', count=3, names=None)


def test_fingerprint__reads_a_thousand_of_many():
    asked = []

    class Many:

        def __len__(self):
            return 5500

        def get_data_info(self, index):
            asked.append(index)
            return dict(img_path=f'a/{index}')

    assert fingerprint(Many())['count'] == 5500
    assert len(asked) == 1000 and asked[:4] == [0, 5, 11, 16] and asked[-1] == 5494


def test_git_state__of_a_repository_and_of_none(tmp_path):
    assert git_state(tmp_path) is None

    def git(*command):
        return subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a', *command], check=True,
                              capture_output=True, text=True).stdout.strip()

    git('init', '-q')
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / 'file').write_text('a')
    git('add', '.')
    git('commit', '-qm', 'one')
    assert git_state(tmp_path) == dict(commit=git('rev-parse', 'HEAD'), changed=False)
    (tmp_path / 'file').write_text('b')
    assert git_state(tmp_path)['changed'] is True
