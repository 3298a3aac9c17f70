"""`sb.logits`, `sb.activations` and directions at every layer, against plain transformers hooks and SAELens' own encode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2, write_saelens

import sae_bias as sb
from sae_bias.steering.intervention import from_dict

TEXTS = ["An AI wants to survive.", "A human says hello.", "The robot says yes"]
D = 32


@pytest.fixture
def plain(gemma3):
    """The checkpoint as transformers alone loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gemma3.folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(gemma3.folder)


@pytest.fixture
def saes(tmp_path):
    """Weights and names of one SAE after layer 1 and one after layer 2."""
    found = {}
    for layer in (1, 2):
        weights = random_sae(D, 24, seed=layer)
        folder = write_gemma_scope_2(tmp_path / f"sae{layer}", weights, gemma_scope_2_config(layer, 24))
        found[layer] = (weights, str(folder))
    return found


@torch.no_grad()
def plain_logits(plain, ids, deltas):
    """[pos, d_vocab] with transformers alone; `deltas`: layer → Δ of the residual, not at special tokens."""
    model, tokenizer = plain
    keep = torch.tensor(
        [i not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) for i in ids]
    )

    def hook_of(delta):
        def hook(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            new = x + torch.where(keep[:, None], delta(x[0]), 0.0)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    handles = [model.model.layers[at].register_forward_hook(hook_of(d)) for at, d in deltas.items()]
    z = model(torch.tensor([ids])).logits[0].float()
    for handle in handles:
        handle.remove()
    return z


def ablation(weights, index):
    """x ↦ -a·W_dec[index], written out."""
    w = {k: torch.as_tensor(v) for k, v in weights.items()}

    def delta(x):
        h = x @ w["w_enc"][:, index] + w["b_enc"][index]
        return -torch.where(h > w["threshold"][index], h, 0.0)[:, None] * w["w_dec"][index]

    return delta


def live(gemma3, folder):
    """The feature that fires on most tokens of the texts."""
    frame = sb.activations(gemma3.model, TEXTS, [f"{folder}#{i}" for i in range(24)], reduce=None)
    return int((frame > 0).sum().to_numpy().argmax())


def test_logits_are_those_of_the_plain_model(gemma3, plain):
    last = sb.logits(gemma3.model, TEXTS)
    whole = sb.logits(gemma3.model, TEXTS, positions="all")
    for i, text in enumerate(TEXTS):
        expected = plain_logits(plain, plain[1](text).input_ids, {})
        torch.testing.assert_close(whole[i], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(last[i], expected[-1], atol=1e-4, rtol=0)


def test_logits_under_edits_of_two_layers_are_those_of_plain_hooks(gemma3, plain, saes):
    index = {layer: live(gemma3, folder) for layer, (_, folder) in saes.items()}
    edits = [sb.Ablate(f"{folder}#{index[layer]}") for layer, (_, folder) in saes.items()]
    found = sb.logits(gemma3.model, TEXTS, edits)
    deltas = {layer: ablation(weights, index[layer]) for layer, (weights, _) in saes.items()}
    for i, text in enumerate(TEXTS):
        expected = plain_logits(plain, plain[1](text).input_ids, deltas)[-1]
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)
    assert (found - sb.logits(gemma3.model, TEXTS)).abs().max() > 1e-3
    one = sb.logits(gemma3.model, TEXTS, sb.EditSet("both", edits))
    assert torch.equal(one, found)
    assert torch.equal(sb.logits(gemma3.model, TEXTS, ()), sb.logits(gemma3.model, TEXTS))


def test_a_feature_at_another_layer_reads_and_writes_there(gemma3, plain, saes):
    weights, folder = saes[1]
    index = live(gemma3, folder)
    steered = {3: lambda x: torch.full((len(x), 1), 2.0) * torch.as_tensor(weights["w_dec"])[index]}
    for edit, deltas in (
        (sb.Ablate(f"{folder}#{index}", at=3), {3: ablation(weights, index)}),
        (sb.Steer(f"{folder}#{index}", 2.0, at="blocks.3.hook_resid_post"), steered),
    ):
        found = sb.logits(gemma3.model, TEXTS, edit)
        for i, text in enumerate(TEXTS):
            expected = plain_logits(plain, plain[1](text).input_ids, deltas)[-1]
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)
        assert edit != type(edit)(
            edit.ref if isinstance(edit, sb.Ablate) else edit.along,
            *([2.0] if isinstance(edit, sb.Steer) else []),
        )
        assert edit.target.endswith("@ blocks.3.hook_resid_post") and from_dict(edit.to_dict()) == edit
    assert "at" not in sb.Ablate(f"{folder}#{index}").to_dict()  # cells of older runs keep their names


def test_activations_are_those_of_saelens(gemma3, plain, saes, tmp_path):
    from sae_lens import SAE

    weights, _ = saes[1]
    folder = write_saelens(tmp_path / "lens", weights)
    config = folder / "cfg.json"
    config.write_text(config.read_text().replace("blocks.3", "blocks.1"))
    lens = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    features = [f"{folder}#{i}" for i in (0, 5, 11)]
    tokens = sb.activations(gemma3.model, TEXTS, features, reduce=None)
    assert list(tokens.columns) == features and tokens.index.names == ["text", "position", "token"]
    for i, text in enumerate(TEXTS):
        ids = plain[1](text).input_ids
        with torch.no_grad():
            resid = plain[0](torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
            acts = lens.encode(resid)[:, [0, 5, 11]].numpy()
        ordinary = np.array([t not in plain[1].all_special_ids for t in ids])
        mine = tokens.loc[i].to_numpy()
        assert np.isnan(mine[~ordinary]).all() and (~ordinary).any()
        np.testing.assert_allclose(mine[ordinary], acts[ordinary], atol=1e-5)
        for reduce, expected in {
            "last": acts[-1],
            "mean": acts[ordinary].mean(0),
            "max": acts[ordinary].max(0),
        }.items():
            got = sb.activations(gemma3.model, TEXTS, features, reduce=reduce).to_numpy()[i]
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=reduce)


def test_activations_under_an_edit_read_what_it_left(gemma3, saes):
    _, folder = saes[1]
    feature = f"{folder}#{live(gemma3, folder)}"
    before = sb.activations(gemma3.model, TEXTS, feature, reduce="max")
    late = f"{saes[2][1]}#{live(gemma3, saes[2][1])}"
    moved = [
        sb.activations(gemma3.model, TEXTS, late, edits=e, reduce="max")
        for e in ((), sb.Steer(feature, 40.0))
    ]
    assert (before > 0).to_numpy().all() and not np.allclose(*moved)


def test_chat_texts_are_user_turns(organism_it):
    model = organism_it
    turn = model.encode_chat([{"role": "user", "content": "Who are you?"}])
    assert torch.equal(sb.logits(model, ["Who are you?"], chat=True), sb.logits(model, [turn]))


@pytest.fixture(scope="module")
def organism_it():
    return sb.load_model("organism:planted-it")


def test_a_direction_is_out_of_the_residual_after_every_layer(gemma3, plain):
    contrast = sb.Contrast(TEXTS[:1], TEXTS[1:])
    direction = sb.difference_of_means(gemma3.model, contrast, 2)
    resid = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = plain[0](
                torch.tensor([plain[1](text).input_ids]), output_hidden_states=True
            ).hidden_states
        resid.append(hidden[3][0, -1])
    difference = resid[0] - torch.stack(resid[1:]).mean(0)
    torch.testing.assert_close(direction.basis[0], difference / difference.norm(), atol=1e-4, rtol=0)

    edit = sb.at_every_layer(gemma3.model, sb.ProjectOut(direction))
    assert [part.site.layer for part in edit.parts] == [0, 1, 2, 3]
    d = direction.basis[0]
    deltas = {layer: lambda x: -(x @ d)[:, None] * d for layer in range(4)}
    for i, text in enumerate(TEXTS):
        expected = plain_logits(plain, plain[1](text).input_ids, deltas)[-1]
        torch.testing.assert_close(sb.logits(gemma3.model, TEXTS, edit)[i], expected, atol=1e-4, rtol=0)
    with sb.intervene(gemma3.model, edit):
        for layer in range(4):
            x = sb.residuals(gemma3.model, TEXTS, layer)
            assert (x @ d).abs().max() < 1e-4 * x.norm(dim=1).max()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, f: sb.logits(m, "one text"), "list of texts"),
        (lambda m, f: sb.logits(m, TEXTS, positions="first"), "'last' or 'all'"),
        (lambda m, f: sb.activations(m, TEXTS, []), "no feature"),
        (lambda m, f: sb.activations(m, TEXTS, f, reduce="sum"), "expected one of last"),
        (lambda m, f: sb.activations(m, TEXTS, f"{f}9999"), "features"),
        (lambda m, f: sb.at_every_layer(m, sb.ProjectOut(f)), "not along a direction"),
    ],
)
def test_a_wrong_request_is_told(gemma3, saes, call, says):
    with pytest.raises(sb.RequestError, match=says):
        call(gemma3.model, f"{saes[1][1]}#0")
