"""tools/replay.py."""
import json
import runpy
import sys

import pytest

from .conftest import ROOT


def test_replay__misspelt_option_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    record, config = tmp_path / 'iter_3_rank_0.json', 'mmhdistill::hdistill/vit-b_clip-mae_300e.py'
    record.write_text(json.dumps(dict(checkpoint='iter_3.pth', iteration=3)))
    (tmp_path / 'iter_3.pth').touch()
    monkeypatch.setattr(sys, 'argv', ['replay.py', config, str(record), '--cfg-options', 'model.masker.keep_rat=0.5'])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / 'tools/replay.py'), run_name='__main__')
    assert error.value.code.startswith(
        f'{config}: the config has settings that nothing would read:\n--cfg-options model.masker.keep_rat: '
        "model.masker: no 'keep_rat' is taken: did you mean 'keep_rate'?")
