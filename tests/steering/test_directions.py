"""Baseline directions: each recovers a planted direction and reports none in a control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.steering import directions, ridge
from sae_bias.steering.directions import (
    difference_of_means,
    difference_subspace,
    massive_dimensions,
    random_direction,
    random_subspace,
)
from sae_bias.steering.ridge import ridge_probe

D = 32


@pytest.fixture
def drawn(monkeypatch):
    """Residuals drawn by hand in place of the model's: human prompts are noise, AI prompts noise plus a shift."""

    def use(human: torch.Tensor, ai: torch.Tensor) -> None:
        monkeypatch.setattr(directions, "residuals", lambda *a, **k: torch.cat([human, ai]))

    return use


def _noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_difference_of_means_is_the_shift(gemma3, pairs, drawn):
    shift = torch.zeros(D)
    shift[4] = 3.0
    human = 0.01 * _noise(6, 0)
    drawn(human, human + shift)
    found = difference_of_means(gemma3.model, pairs, 1)
    assert float(found.basis[0] @ shift / 3) == pytest.approx(1.0)
    assert torch.equal(found.mean, human.mean(0))


def test_projecting_it_out_gives_ai_prompts_the_human_mean_along_it(gemma3, pairs):
    """On the model itself: x' - μ has nothing along the direction at the edited position."""
    along = difference_of_means(gemma3.model, pairs, 1)
    seen: list[torch.Tensor] = []
    with sb.intervene(gemma3.model, sb.ProjectOut(along)):
        handle = gemma3.model.layer(2).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        gemma3.model.base(input_ids=torch.tensor([gemma3.model.encode(pairs[0].ai)]))
        handle.remove()
    left = (seen[0][0, 1:] - along.mean) @ along.basis[0]
    assert float(left.abs().max()) < 1e-4 * float(seen[0].norm())


def test_equal_means_have_no_direction(gemma3, pairs, drawn):
    drawn(torch.ones(6, D), torch.ones(6, D))
    with pytest.raises(sb.SaeBiasError, match="there is no direction"):
        difference_of_means(gemma3.model, pairs, 1)


def test_massive_dimensions_are_left_out_and_counted(gemma3, pairs, drawn):
    """Two huge dimensions carry the whole raw difference; without them the real one is found."""
    human = _noise(6, 1)
    ai = human.clone()
    ai[:, 9] += 1.0
    for side, sign in ((human, 1.0), (ai, -1.0)):
        side[:, 2] = 5000.0 + sign * 40
        side[:, 3] = 9000.0 - sign * 70
    drawn(human, ai)
    assert massive_dimensions(torch.cat([human, ai])).nonzero()[:, 0].tolist() == [2, 3]
    raw = difference_of_means(gemma3.model, pairs, 1)
    clean = difference_of_means(gemma3.model, pairs, 1, without_massive=True)
    assert float(raw.basis[0, 9].abs()) < 0.05
    assert float(clean.basis[0, 9]) == pytest.approx(1.0)
    assert "without 2 massive dimensions" in clean.name


def test_the_subspace_is_spanned_by_the_paired_differences(gemma3, pairs, drawn):
    human = _noise(6, 2)
    two = torch.linalg.qr(_noise(2, 3).T).Q.T
    weights = torch.tensor([[3.0, 0.2], [2.5, 1.5], [3.5, -1.0], [2.0, 0.7], [3.0, -0.6], [2.8, 1.1]])
    drawn(human, human + weights @ two)
    found = difference_subspace(gemma3.model, pairs, 1, 2)
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(2), atol=1e-5)
    assert torch.allclose(found.basis.T @ found.basis, two.T @ two, atol=1e-4)
    with pytest.raises(sb.SaeBiasError, match="span 2"):
        difference_subspace(gemma3.model, pairs, 1, 3)


def test_random_directions_come_from_their_seed():
    site = sb.Site(1)
    assert random_direction(D, site, 3) == random_direction(D, site, 3)
    assert random_direction(D, site, 3) != random_direction(D, site, 4)
    basis = random_subspace(D, site, 4, 0).basis
    assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-5)


# --- ridge ---


@pytest.fixture
def layers_of(monkeypatch):
    def use(*layers: np.ndarray) -> None:
        monkeypatch.setattr(ridge, "_last_residuals", lambda model, texts, which: list(layers))

    return use


def _texts(n: int) -> list[str]:
    return [f"text {i}" for i in range(n)]


def test_ridge_finds_the_layer_that_holds_the_target(gemma3, layers_of):
    """R² near 1 where the target is linear in x, not above shuffled labels where x is noise; the direction is found."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=D) / D**0.5
    signal, noise = rng.normal(size=(200, D)), rng.normal(size=(200, D))
    y = signal @ w + 0.1 * rng.normal(size=200)
    layers_of(noise, signal)
    probe = ridge_probe(gemma3.model, _texts(200), y, layers=[0, 1])
    frame = probe.frame.set_index("layer")
    assert frame.loc[1, "r2"] > 0.95
    assert frame.loc[1, "r2"] > frame.loc[1, "r2_shuffled_95"]
    assert frame.loc[0, "r2"] < frame.loc[0, "r2_shuffled_95"] + 0.1
    assert frame.loc[1, "p_value"] == pytest.approx(1 / 21)
    assert frame["r2"].idxmax() == 1
    assert abs(float(probe.direction(1).basis[0] @ torch.from_numpy(w / np.linalg.norm(w)).float())) > 0.99


def test_ridge_holds_out_whole_templates(gemma3, layers_of):
    """A target that is a property of the template alone cannot be read on other templates: no leak between folds."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(10), 20)
    y = rng.normal(size=10)[group]
    x = np.zeros((200, D))
    x[np.arange(200), group] = 5.0
    x += 0.01 * rng.normal(size=x.shape)
    layers_of(x)
    held = ridge_probe(gemma3.model, _texts(200), y, layers=[0], groups=list(group)).frame["r2"][0]
    layers_of(x)
    leaking = ridge_probe(gemma3.model, _texts(200), y, layers=[0]).frame["r2"][0]
    assert leaking > 0.95
    assert held < 0.1


def test_ridge_on_pairs_reads_ai_against_human(gemma3, pairs):
    probe = ridge_probe(gemma3.model, pairs, folds=3, shuffles=5)
    assert list(probe.frame["layer"]) == list(range(gemma3.model.n_layers))
    assert probe.frame["n"].iloc[0] == 2 * len(pairs)
    assert probe.frame["n_groups"].iloc[0] == 3
    along = probe.direction(2)
    assert along.basis.shape == (1, gemma3.model.d_model)
    assert float(along.basis.norm()) == pytest.approx(1.0)
    with pytest.raises(sb.SaeBiasError, match="was not probed"):
        probe.direction(9)


@pytest.mark.parametrize("penalty", [0, 7, 14])
def test_ridge_equals_the_normal_equations(penalty):
    """(XᵀX + λI)⁻¹Xᵀy, and the path's prediction is the weights'."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 1))
    fit = ridge._Ridge(x, y)
    fit.best[:] = penalty
    z = (x - x.mean(0)) / fit.scale
    expected = (
        np.linalg.solve(z.T @ z + fit.penalties[penalty] * np.eye(6), z.T @ (y - y.mean(0))) / fit.scale
    )
    np.testing.assert_allclose(fit.weights, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(fit.paths(x)[:, :, penalty], fit.predict(x), atol=1e-9)


def test_the_penalty_is_chosen_on_other_templates(gemma3, layers_of):
    """Where templates differ much more than the two sides do, a probe that fits them does worse than none: R² stays near 0."""
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(12), 10)
    x = 5 * rng.normal(size=(12, D))[group] + rng.normal(size=(120, D))
    layers_of(x)
    probe = ridge_probe(gemma3.model, _texts(120), np.tile([0.0, 1.0], 60), layers=[0], groups=list(group))
    assert -0.2 < probe.frame["r2"][0] < 0.2


@pytest.mark.parametrize(
    ("targets", "groups", "message"),
    [
        (None, None, "need targets"),
        ([1.0, 2.0], None, "expected one each"),
        ([1.0] * 8, None, "all equal"),
        (list(range(8)), [0] * 8, "there are 1 groups"),
    ],
)
def test_wrong_ridge_inputs_are_refused(gemma3, targets, groups, message):
    with pytest.raises(sb.SaeBiasError, match=message):
        ridge_probe(gemma3.model, _texts(8), targets, groups=groups)
