"""The fast training step is SAELens' own step; a resumed training ends where an unbroken one does; the saved SAE is the trained one."""

from __future__ import annotations

import pytest
import torch
from real_models import training
from real_models.sparse_batchtopk import SparseBatchTopK, largest
from real_models.training import JumpReluWeights, Normalizer, SaeRecipe
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

RECIPE = SaeRecipe(3, width=1024, k=8, steps=10, batch_size=256)


def rows(n=4000, d=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 50
    x[::97] *= 20  # positions of many times the usual norm, as Gemma 3 has them
    return (x / 64).half()


def saes():
    config = BatchTopKTrainingSAEConfig(
        d_in=32, d_sae=256, k=8, apply_b_dec_to_input=False, normalize_activations="none"
    )
    torch.manual_seed(0)
    theirs = BatchTopKTrainingSAE(config)
    ours = SparseBatchTopK(config)
    ours.load_state_dict(theirs.state_dict())
    ours.fast = False
    return theirs, ours


@pytest.mark.parametrize("n_dead", [0, 5, 200])
def test_the_fast_step_has_saelens_loss_and_gradients(n_dead):
    theirs, ours = saes()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(256, dtype=torch.bool)
    dead[:n_dead] = True
    step = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )
    a, b = theirs.training_forward_pass(step), ours.training_forward_pass(step)
    assert torch.allclose(a.loss, b.loss, rtol=1e-5)
    assert torch.allclose(a.sae_out, b.sae_out, atol=1e-5)
    assert torch.allclose(a.feature_acts, b.feature_acts.to_dense(), atol=1e-5)
    assert torch.allclose(theirs.topk_threshold, ours.topk_threshold)
    a.loss.backward()
    b.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(parameter.grad, dict(ours.named_parameters())[name].grad, atol=1e-4), name


def test_long_rows_count_by_their_relative_error():
    """SAELens' own loss with the squared error of rows longer than 8 divided by (length / 8)²."""
    theirs, ours = saes()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    x[:3] *= 50
    lengths = x.norm(dim=-1, keepdim=True)
    assert int((lengths > 8).sum()) == 3
    theirs.mse_loss_fn = lambda out, target: (out - target) ** 2 / (lengths / 8).clamp(min=1) ** 2
    ours.longest = 8.0
    step = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=torch.zeros(256, dtype=torch.bool), n_training_steps=0,
        is_logging_step=False,
    )  # fmt: skip
    a, b = theirs.training_forward_pass(step), ours.training_forward_pass(step)
    assert torch.allclose(a.loss, b.loss, rtol=1e-5)
    a.loss.backward()
    b.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(parameter.grad, dict(ours.named_parameters())[name].grad, atol=1e-4), name


def test_largest_is_topk_whatever_the_hint():
    flat = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    expected = set(flat.topk(100).indices.tolist())
    assert all(set(largest(flat, 100, hint).tolist()) == expected for hint in (0.0, 0.1, 2.0, 100.0))


def test_a_resumed_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RESAMPLE_EVERY", 3)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 5)
    whole = training.train(rows(), 64.0, RECIPE, tmp_path / "whole", fast=False)
    batches = training._batches

    def stopping(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs)):
            if i == 7:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(training, "_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.train(rows(), 64.0, RECIPE, tmp_path / "cut", fast=False)
    monkeypatch.setattr(training, "_batches", batches)
    resumed = training.train(rows(), 64.0, RECIPE, tmp_path / "cut", fast=False)
    assert all(torch.equal(vars(whole)[name], vars(resumed)[name]) for name in vars(whole))


def test_folding_changes_nothing(tmp_path):
    """The saved JumpReLU SAE on raw residuals is the trained one on normalized residuals."""
    x = rows()
    normalize = Normalizer.of(x.float())
    trainer = training._trainer(RECIPE, 32, fast=False)
    sae = trainer.sae
    sae.topk_threshold = torch.tensor(0.3, dtype=torch.double)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
    saved = training.folded(sae, normalize, 64.0)
    raw = x.float() * 64
    z = (raw / 64 - normalize.mean) * normalize.factor
    h = (z @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=-1)
    acts = torch.where(h > 0.3, h, 0.0)
    hat = (acts / sae.W_dec.norm(dim=-1)) @ sae.W_dec + sae.b_dec
    expected = (hat / normalize.factor + normalize.mean) * 64
    assert torch.allclose(saved.decode(saved.encode(raw)), expected, rtol=1e-3, atol=0.5)
    assert torch.allclose(saved.w_dec.norm(dim=-1), torch.ones(1024), atol=1e-5)


def test_long_rows_are_trained_on_at_their_full_length():
    """Rows of 20 times the usual norm do not set the scale (0.003 if they did), and are not shortened: the map of the rows is affine."""
    x = rows().float()
    normalize = Normalizer.of(x)
    usual = torch.ones(len(x), dtype=torch.bool)
    usual[::97] = False
    assert 0.3 < normalize(x)[usual].pow(2).mean() <= 1.0
    halves = normalize(x / 2) + normalize.mean * normalize.factor
    assert torch.allclose(2 * halves, normalize(x) + normalize.mean * normalize.factor, atol=1e-4)


def test_the_randomized_twin_fires_as_often_and_means_nothing():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 32, generator=generator)
    w_dec = torch.nn.functional.normalize(torch.randn(128, 32, generator=generator), dim=-1)
    sae = JumpReluWeights(
        w_dec.T.contiguous(), w_dec, torch.zeros(128), torch.zeros(32), torch.full((128,), 2.0)
    )
    twin = training.randomized(sae, x)
    before, after = (sae.encode(x) > 0).float().mean(0), (twin.encode(x) > 0).float().mean(0)
    assert torch.allclose(before, after, atol=2e-3)
    assert torch.allclose(twin.w_dec.norm(dim=-1), sae.w_dec.norm(dim=-1))
    assert (torch.nn.functional.cosine_similarity(twin.w_dec, sae.w_dec).abs().mean()) < 0.3
