"""Attention in windows of a grid of patches, with decomposed relative positions (ViTDet, arXiv 2203.16527)."""
import torch
import torch.nn.functional as F
from torch import Tensor


def to_windows(x: Tensor, grid: tuple[int, int], window: int) -> tuple[Tensor, Tensor | None]:
    """(B, heads, h w, d) -> (B W, heads, window^2, d): the W windows of each image, row by row.

    Returns:
        The windows, and which of their tokens lie inside the grid, (B W, window^2) bool, or None where all do: the grid
        is padded with zeros below and to the right.
    """
    rows, columns = grid
    below, right = -rows % window, -columns % window

    def cut(image: Tensor) -> Tensor:
        """(B, c, h, w, d) -> (B W, c, window^2, d)."""
        image = F.pad(image, (0, 0, 0, right, 0, below))
        image = image.unflatten(3, (-1, window)).unflatten(2, (-1, window))
        return image.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    inside = None
    if below or right:
        inside = cut(x.new_ones(len(x), 1, rows, columns, 1))[:, 0, :, 0].bool()
    return cut(x.unflatten(2, grid)), inside


def from_windows(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Inverse of :func:`to_windows`: (B W, heads, window^2, d) -> (B, heads, h w, d)."""
    rows, columns = (-(-side // window) for side in grid)
    image = windows.unflatten(0, (-1, rows, columns)).unflatten(4, (window, window))
    image = image.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return image[:, :, :grid[0], :grid[1]].flatten(2, 3)


def relative_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int],
                       tables: tuple[Tensor, Tensor] | None = None, inside: Tensor | None = None,
                       dropout: float = 0.0) -> Tensor:
    """``softmax(q k^T / sqrt(d) + q R_rows^T + q R_columns^T) v`` without an N x N tensor in memory.

    The bias of query i at key j is a product too, of q_i R (a number for each row and each column) with the one-hot row
    and column of j: it is appended to q and k as channels, and the attention stays fused.

    Args:
        q, k, v: (B, heads, h w, d).
        tables: of the rows and of the columns, (2 s - 1, d): entry ``i - j + s - 1`` for query i and key j; resampled
            linearly where s is not the side of the grid.
        inside: (B, h w) bool, the keys that exist; others get no weight.
        dropout: probability that a weight is dropped, after the softmax; the others grow by ``1 / (1 - dropout)``.
    """
    if tables is None and inside is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    width = q.shape[-1]
    queries, keys = [q * width**-0.5], [k]
    if tables is not None:
        image = q.unflatten(2, grid)
        for table, side, equation in zip(tables, grid, ('bnhwc,hkc->bnhwk', 'bnhwc,wkc->bnhwk')):
            queries.append(torch.einsum(equation, image, relative_embeddings(table, side).to(q)).flatten(2, 3))
        rows, columns = (torch.eye(side, dtype=k.dtype, device=k.device) for side in grid)
        places = rows.repeat_interleave(grid[1], dim=0), columns.repeat(grid[0], 1)
        keys += [place.expand(*k.shape[:2], -1, -1) for place in places]
    if inside is not None:
        queries.append(torch.ones_like(q[..., :1]))
        # exp(-1e4) is 0, and half precision holds it.
        keys.append((inside.to(k) - 1).mul(1e4)[:, None, :, None].expand(-1, k.shape[1], -1, -1))
    # Fused kernels want one width for all, a multiple of 8.
    short = -sum(part.shape[-1] for part in queries) % 8
    q, k = (F.pad(torch.cat(parts, dim=-1), (0, short)) for parts in (queries, keys))
    v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=1.0)[..., :width]


def relative_embeddings(table: Tensor, side: int) -> Tensor:
    """(2 s - 1, d) -> (side, side, d), the embedding of each pair of query and key along one axis."""
    index = torch.arange(side, device=table.device)
    return resample_table(table, side)[index[:, None] - index[None, :] + side - 1]


def resample_table(table: Tensor, side: int) -> Tensor:
    """(2 s - 1, d) -> (2 side - 1, d), linearly; ``table`` itself where the sides are equal."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.float().T[None], 2 * side - 1, mode='linear')[0].T.to(table)
