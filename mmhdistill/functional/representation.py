"""What the features of a model look like, and how alike those of two models are."""
import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of two views of the same n things, (n, C) and (n, C'), in 0 to 1.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) of centred columns (Kornblith et al., arXiv 1905.00414): 1 where one is a rotation,
    shift or scaling of the other; nan where one does not vary. In float64.
    """
    return linear_cka_matrix([x], [y])[0, 0]


def linear_cka_matrix(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """:func:`linear_cka` of each of ``xs`` with each of ``ys``, (len(xs), len(ys)); each is prepared once.

    Args:
        xs, ys: views of the same n things, (n, C) each, and (n, C').
    """
    counts = {len(view) for view in (*xs, *ys)}
    if len(counts) > 1:
        raise ValueError(f'CKA compares views of the same things, got {" and ".join(map(str, sorted(counts)))}.')
    xs, ys = ([view.double() - view.double().mean(dim=0) for view in views] for views in (xs, ys))
    if max(view.shape[1] for view in (*xs, *ys)) > counts.pop():
        xs, ys = ([view @ view.T for view in views] for views in (xs, ys))
        norms = ([view.norm() for view in views] for views in (xs, ys))
        alike = [[(x * y).sum() for y in ys] for x in xs]
    else:
        norms = ([(view.T @ view).norm() for view in views] for views in (xs, ys))
        alike = [[(y.T @ x).square().sum() for y in ys] for x in xs]
    return torch.stack([torch.stack(row) for row in alike]) / torch.outer(*map(torch.stack, norms))


def effective_rank(x: Tensor) -> Tensor:
    """Number of directions that n features use, (n, C) -> 1 to min(n, C): exp of the entropy of the spectrum.

    The spectrum is that of the singular values of the centred features, made to sum to 1 (Roy & Vetterli, EUSIPCO
    2007); nan for features that do not vary or are not finite. In float64.
    """
    x = x.double() - x.double().mean(dim=0)
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    if not torch.isfinite(gram).all():
        return gram.new_tensor(float('nan'))
    squares = torch.linalg.eigvalsh(gram)
    # What is below it is rounding.
    floor = squares[-1] * len(gram) * torch.finfo(gram.dtype).eps
    values = squares.where(squares > floor, 0).sqrt()
    return torch.special.entr(values / values.sum()).sum().exp()


def fourier_log_amplitude(featmap: Tensor) -> Tensor:
    """Log amplitude of feature maps along the diagonal from frequency 0 up to pi, relative to that at 0.

    Mean over images and channels, as in "How Do Vision Transformers Work?" (arXiv 2202.06709): how much of the high
    frequencies a layer keeps. In float64.

    Args:
        featmap: (B, C, s, s).

    Returns:
        (s // 2 + 1,), at frequencies 0, 2 pi / s, ..., up to pi if s is even; 0 at the first.
    """
    side = featmap.shape[-1]
    if featmap.shape[-2] != side:
        raise ValueError(f'the diagonal of the spectrum needs square maps, got {tuple(featmap.shape[-2:])}.')
    spectrum = torch.fft.fft2(featmap.double()).abs()[..., :side // 2 + 1, :side // 2 + 1]
    diagonal = (spectrum.diagonal(dim1=-2, dim2=-1) + 1e-6).log().mean(dim=(0, 1))
    return diagonal - diagonal[0]
