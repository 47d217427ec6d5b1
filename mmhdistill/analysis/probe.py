"""Linear probe of frozen features."""
import torch
from torch import Tensor


def linear_probe_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor) -> Tensor:
    """Classes of the queries, (Q,), by scikit-learn's logistic regression on standardised features.

    Args:
        bank, queries: (M, C) and (Q, C), for example of :func:`mmhdistill.analysis.models.readouts`.
        bank_labels: (M,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(bank.double().cpu().numpy(), bank_labels.cpu().numpy())
    return torch.from_numpy(probe.predict(queries.double().cpu().numpy()))
