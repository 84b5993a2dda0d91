"""One-to-one matching of channels: by maximum assignment, by maximum-weight matching, or as they are."""

from __future__ import annotations

import networkx
import numpy as np
import torch
from torch import Tensor

from merge_ray.errors import ParameterError
from merge_ray.matching.membership import Membership

Matched = tuple[Membership, float]
"""A membership, and the mean similarity of what was matched."""


def identity(models: int, channels: int) -> Matched:
    """Every channel with the channel of the same number in the other models."""
    return Membership(torch.arange(channels).repeat(models, 1), channels), 1.0


def permute(similarity: Tensor, models: int, groups: int = 1) -> Matched:
    """Align every model with the first, so that the similarity of the pairs is the largest that it can be.

    similarity: ``[N C, N C]``, the models one below the other. groups: channels come in so many equal consecutive
    groups (attention heads, GroupNorm), which are matched as wholes.

    The mean similarity is over all models; without groups that of the last model, as MuDSC's code for models of
    different tasks has it.
    """
    matrix = blocks(similarity, models)
    channels = len(matrix) // models
    columns, values = np.tile(np.arange(channels), (models, 1)), []
    for model in range(1, models):
        block = matrix[:channels, model * channels : (model + 1) * channels]
        chosen, value = assign(block, groups)
        columns[model, chosen] = np.arange(channels)
        values.append(value)
    value = (values[-1] if groups == 1 else float(np.mean(values))) if values else 1.0
    return Membership(torch.from_numpy(columns), channels), value


def assign(similarity: np.ndarray, groups: int = 1) -> tuple[np.ndarray, float]:
    """For every row of ``[C, C]`` its column in the maximum assignment, int64 ``[C]``, and the mean of the pairs.

    With groups, every pair of groups is assigned within, and the groups by the means of that.
    """
    if groups == 1:
        # Imported here: every host would wait a second for it, and few match anything.
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(similarity, maximize=True)
        return columns, float(similarity[rows, columns].mean(dtype=np.float64))
    size = len(similarity) // groups
    tiles = similarity.reshape(groups, size, groups, size).transpose(0, 2, 1, 3)
    inner = [[assign(tile) for tile in row] for row in tiles]
    chosen, value = assign(np.array([[score for _, score in row] for row in inner]))
    return np.concatenate([inner[row][column][0] + column * size for row, column in enumerate(chosen)]), value


def optimal(similarity: Tensor, models: int) -> Matched:
    """The pairing of all channels, within models too, whose summed similarity is the largest; for two models.

    The blossom algorithm takes time in the cube of the channels: for small groups.
    """
    if models != 2:
        raise ParameterError(f"the optimal matching pairs the channels of two models; these are {models}")
    matrix = blocks(similarity, models)
    # Positive weights leave no channel alone in the heaviest matching.
    graph = networkx.from_numpy_array(matrix.astype(np.float64) - (matrix.min() - 1))
    pairs = np.array(sorted(sorted(pair) for pair in networkx.max_weight_matching(graph)))
    columns = np.empty(len(matrix), np.int64)
    columns[pairs] = np.arange(len(pairs))[:, None]
    value = float(matrix[pairs[:, 0], pairs[:, 1]].mean(dtype=np.float64))
    return Membership(torch.from_numpy(columns.reshape(2, -1)), len(pairs)), value


def blocks(similarity: Tensor, models: int) -> np.ndarray:
    """The matrix ``[N C, N C]`` of so many models as an array; raises :class:`ParameterError` if it is none."""
    matrix = similarity.numpy(force=True)
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1] or len(matrix) % models:
        raise ParameterError(f"the similarity of {models} models is square, not {list(matrix.shape)}")
    return matrix
