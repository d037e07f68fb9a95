"""The digits: real 8x8 images, their conditioning, and the two figures of merit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
NULL_LABEL = CLASSES  # the label of "no class", for classifier-free guidance
PCA_DIMENSIONS = 24


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: ``images`` [1797, 1, 8, 8] in [-1, 1], ``labels`` [1797] in 0..9."""

    images: Tensor
    labels: Tensor


def load_digits() -> Digits:
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8.0 - 1.0
    return Digits(images, torch.from_numpy(bunch.target).long())


def conditioning(labels: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of the transformer for ``labels`` [B] (0..9, or NULL_LABEL): the one-hot class, as the
    pooled projection [B, 11] and as one text token [B, 1, 11]."""
    one_hot = torch.nn.functional.one_hot(labels, CLASSES + 1).float()
    return {"encoder_hidden_states": one_hot.unsqueeze(1), "pooled_projections": one_hot}


def unconditional(labels: Tensor) -> dict[str, Tensor]:
    return conditioning(torch.full_like(labels, NULL_LABEL))


@dataclass(frozen=True)
class PCASpace:
    """Mean and leading principal axes of the data's pixels, with the data's own Gaussian in that space."""

    centre: np.ndarray  # [64]
    axes: np.ndarray  # [24, 64]
    covariance: np.ndarray  # [24, 24]

    @classmethod
    def of(cls, images: Tensor) -> PCASpace:
        pixels = images.flatten(1).double().numpy()
        centre = pixels.mean(0)
        _, _, axes = np.linalg.svd(pixels - centre, full_matrices=False)
        axes = axes[:PCA_DIMENSIONS]
        return cls(centre, axes, np.cov((pixels - centre) @ axes.T, rowvar=False))

    def frechet_distance(self, images: Tensor) -> float:
        """|mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2)) between the data and ``images`` [N, 1, 8, 8] (Heusel et al.
        2017, with a 24-dimensional PCA of the pixels in place of Inception features)."""
        projected = (images.flatten(1).double().numpy() - self.centre) @ self.axes.T
        covariance = np.cov(projected, rowvar=False)
        # The eigenvalues of C C' are real and non-negative: it is similar to C^(1/2) C' C^(1/2).
        eigenvalues = np.linalg.eigvals(self.covariance @ covariance).real
        cross = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
        mean = projected.mean(0)
        return float(mean @ mean + np.trace(self.covariance) + np.trace(covariance) - 2.0 * cross)


def rmse(images: Tensor, reference: Tensor) -> float:
    """Root mean square pixel distance, pixels in [-1, 1]."""
    return float((images.double() - reference.double()).square().mean().sqrt())
