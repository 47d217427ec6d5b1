"""Peak memory of attention's statistics by blocks of rows, against that of whole maps."""
import subprocess
import sys

import pytest

# 2,304 patches and a class token, a ViT/16 at 768 px. Each way in a process of its own: a peak never falls.
_SCRIPT = '''
import sys
import torch
from mmhdistill.functional import attention_distance, attention_from_qk, attention_nmi, attention_statistics

def resident(field):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

torch.manual_seed(0)
q, k = torch.randn(2, 1, 2305, 256)
attention_statistics(q[:, :9], k[:, :9], 4, (2, 4), 16, 1)
before = resident('VmRSS')
if sys.argv[1] == 'rows':
    found = attention_statistics(q, k, 4, (48, 48), 16, 1)
    nmi, distance = found['nmi'], found['distance']
else:
    attention = attention_from_qk(q, k, 4, 1)
    nmi, distance = attention_nmi(attention), attention_distance(attention, (48, 48), 16)
print(resident('VmHWM') - before, *nmi.tolist(), *distance.tolist())
'''


@pytest.mark.slow
def test_attention_statistics__need_at_most_three_tenths_of_the_memory():
    found = {}
    for way in ('rows', 'whole'):
        done = subprocess.run([sys.executable, '-c', _SCRIPT, way], capture_output=True, text=True, check=True)
        found[way] = [float(word) for word in done.stdout.split()]
    assert found['rows'][1:] == pytest.approx(found['whole'][1:], rel=1e-5)
    assert found['rows'][0] <= 0.3 * found['whole'][0]
    # The whole map alone: 4 heads of 2304 x 2304 numbers of 8 bytes, in KiB.
    assert found['whole'][0] > 4 * 2304**2 * 8 / 1024
