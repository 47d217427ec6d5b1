# The weight of the relations and their distance, one seed. KL at 0.3 is the cell 'Hybrid, input mask' of grid.py.
#
#   python tools/ablate.py studies/hybrid_on_cifar10/cpu/sweep.py --out work_dirs/sweep
config = 'hybrid.py'
seeds = [0]
cells = {
    f'{distance} {weight}': dict(model=dict(losses=dict(relation=dict(distance=distance, loss_weight=weight))))
    for distance in ('kl', 'smooth_l1') for weight in (0.1, 0.3, 1.0) if (distance, weight) != ('kl', 0.3)
}
