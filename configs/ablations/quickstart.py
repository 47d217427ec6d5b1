# Which part of Hybrid Distill does what, on the data and with the teachers of the quick start, which has to be run
# before, in the same folder.
#
#   bash tools/quickstart.sh
#   python tools/ablate.py configs/ablations/quickstart.py
config = 'mmhdistill::quickstart/hdistill_vit-photos.py'
seeds = [0, 1]
# Name -> what differs from the config. Without a masker the student sees every token.
unmasked = dict(masker=None)
cells = {
    'features': dict(model=dict(losses=dict(relation=None), **unmasked), custom_hooks=[]),
    'relations': dict(model=dict(losses=dict(feature=None), **unmasked), custom_hooks=[]),
    'both': dict(model=unmasked, custom_hooks=[]),
    'both, masked': dict(),
}
