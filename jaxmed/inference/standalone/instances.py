"""Objects from the probabilities of their insides and borders; NumPy and SciPy."""

from __future__ import annotations

import heapq

import numpy as np


def separate_instances(probabilities: np.ndarray, *, smallest: int) -> np.ndarray:
    """Instance numbers (*spatial) int32 from (*spatial, 3) of background, inside and border.

    Seeds are the connected insides; each grows over the foreground around it, from the surest
    voxels outward, until it meets another. Foreground without a seed is an instance of its own.
    """
    import scipy.ndimage

    foreground = probabilities[..., 1] + probabilities[..., 2] > 0.5
    seeds, count = scipy.ndimage.label((probabilities[..., 1] > 0.5) & foreground)
    sizes = np.bincount(seeds.ravel(), minlength=count + 1)
    seeds[sizes[seeds] < max(3, smallest // 3)] = 0
    grown = flood(-probabilities[..., 1], seeds, foreground)
    alone, _ = scipy.ndimage.label(foreground & (grown == 0))
    grown = np.where(alone > 0, alone + count, grown)
    keep = np.bincount(grown.ravel()) >= smallest
    keep[0] = False
    return (np.cumsum(keep) * keep)[grown].astype(np.int32)


def flood(heights: np.ndarray, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Watershed from seeds within a mask, lowest voxels first, the earlier one on a tie.

    Source: Soille and Ansoult 1990 (doi 10.1016/0165-1684(90)90127-K), by a priority queue.
    """
    padded_shape = tuple(side + 2 for side in heights.shape)
    strides = [int(np.prod(padded_shape[axis + 1 :])) for axis in range(heights.ndim)]
    steps = [-stride for stride in strides] + strides[::-1]
    height, free = np.pad(heights, 1).ravel(), np.pad(mask, 1).ravel()
    labels = np.pad(np.where(mask, seeds, 0), 1).ravel()
    free &= labels == 0
    # Only seeds with room beside them have anywhere to grow.
    edge = np.flatnonzero(labels)
    edge = edge[np.any([free[edge + step] for step in steps], axis=0)]
    queue = [(float(height[index]), 0, int(index)) for index in edge]
    heapq.heapify(queue)
    age = 0
    while queue:
        _, _, index = heapq.heappop(queue)
        for step in steps:
            near = index + step
            if free[near]:
                free[near] = False
                labels[near] = labels[index]
                age += 1
                heapq.heappush(queue, (float(height[near]), age, near))
    inner = (slice(1, -1),) * heights.ndim
    return labels.reshape(padded_shape)[inner]
