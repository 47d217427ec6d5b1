import torch

# At the sizes of these tests a second thread costs far more than it computes.
torch.set_num_threads(1)
