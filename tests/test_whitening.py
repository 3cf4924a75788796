"""Whitening of frozen features compared with its definition."""

import torch

from openblip2.model.vision import RIDGE, fit_whitening


def test_whitened_features_are_uncorrelated_and_of_width_one_up_to_the_ridge() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(6, 6).double()
    rows = torch.randn(400, 5, 6).double() @ mixing + 3.0
    white = fit_whitening(rows.float())(rows.float()).flatten(0, 1).double()
    assert white.mean(0).abs().max() < 1e-4
    variances = torch.linalg.eigvalsh(torch.cov(rows.flatten(0, 1).T, correction=0))
    wanted = variances / (variances + RIDGE * variances.mean())
    assert torch.allclose(torch.linalg.eigvalsh(torch.cov(white.T, correction=0)), wanted, atol=1e-4)


def test_it_is_frozen_and_keeps_the_dtype() -> None:
    whitening = fit_whitening(torch.randn(50, 4))
    assert not list(whitening.parameters())
    assert whitening(torch.randn(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
