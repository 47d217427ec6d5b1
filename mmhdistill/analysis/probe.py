"""Linear probe of frozen features."""
from torch import Tensor


def linear_probe_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Top-1 accuracy in percent of scikit-learn's logistic regression on standardised features.

    Args:
        bank, queries: (M, C) and (Q, C), for example of :func:`mmhdistill.analysis.models.readouts`.
        bank_labels, query_labels: (M,) and (Q,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(bank.double().cpu().numpy(), bank_labels.cpu().numpy())
    return 100 * probe.score(queries.double().cpu().numpy(), query_labels.cpu().numpy())
