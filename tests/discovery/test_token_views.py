"""A feature's activation token by token, and the identity sweep from the command line."""

import json

import numpy as np
import pytest
import torch
from run_fixture import UNTRUSTED
from test_scenarios import load_short

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.discovery.tables import TokenActivations
from sae_bias.runs.summary import IdentityFigures
from sae_bias.workflows.behavior import identity_lines, run_scenario_arms

TEXTS = ["An AI says hello. This is", "A dog wants tea."]


def test_activations_are_the_plain_models_hidden_state_through_the_features_own_vectors(gemma3):
    """Independent path: Hugging Face's hidden state, the SAE file's column, the JumpReLU written out."""
    feature = sb.load_feature(gemma3.feature(3))
    view = sb.token_activations(gemma3.model, gemma3.feature(3), TEXTS)
    for text, tokens, acts in zip(TEXTS, view.tokens, view.acts):
        ids = gemma3.model.encode(text)
        with torch.no_grad():
            out = gemma3.model.hf(input_ids=torch.tensor([ids]), output_hidden_states=True)
        x = out.hidden_states[feature.site.layer + 1][0].float()
        h = x @ feature.w_enc + feature.b_enc
        expected = torch.where(h > feature.threshold, h, 0.0).detach().numpy()
        kept = [i for i, t in enumerate(ids) if t not in gemma3.model.special_ids]
        assert acts == pytest.approx(expected[kept], abs=1e-4)
        assert "".join(tokens).strip() == gemma3.model.decode(ids).strip()


def test_the_frame_has_a_row_a_token_and_the_repr_marks_where_it_fires():
    view = TokenActivations("x#1", ((" An", " AI"), (" so",)), ((0.0, 2.0), (0.0,)))
    frame = view.to_frame()
    assert list(frame.columns) == ["text", "position", "token", "activation"]
    assert len(frame) == 3
    assert view.largest == 2.0
    assert "« AI»" in repr(view)


def test_untrusted_tokens_stay_text():
    html = TokenActivations(UNTRUSTED, ((UNTRUSTED, " b"),), ((1.0, 0.0),))._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("background:rgba") == 1


def test_one_text_in_place_of_a_list_and_a_feature_of_another_model_are_refused(gemma3, gemma2):
    with pytest.raises(sb.RequestError, match="list of texts"):
        sb.token_activations(gemma3.model, gemma3.feature(3), "An AI")
    wrong = sb.load_feature(gemma3.feature(3))
    if wrong.w_enc.shape[-1] != gemma2.model.d_model:
        with pytest.raises(sb.RequestError):
            sb.token_activations(gemma2.model, wrong, TEXTS)


def test_a_silent_feature_reads_zero_and_is_drawn_without_color():
    view = TokenActivations("x#1", ((" a", " b"),), ((0.0, 0.0),))
    assert view.largest == 0.0
    assert "background" not in view._repr_html_()


# ── a system prompt opens every behavioral measure


def test_a_system_prompt_opens_the_text(gemma3):
    """In the plain form the system prompt is text before the prompt: the same completion as of both together."""
    told = sb.generate(gemma3.model, ["An AI says"], system="A human wants tea.", max_new_tokens=4)
    whole = sb.generate(gemma3.model, ["A human wants tea.\n\nAn AI says"], max_new_tokens=4)
    assert told[0].tokens == whole[0].tokens
    assert told[0].prompt == "An AI says"


def test_the_likelihood_is_of_the_text_after_the_system_prompt(gemma3):
    from sae_bias.measures.text import text_measures, token_nll

    model = gemma3.model
    done = sb.generate(model, TEXTS, system="A human wants tea.", max_new_tokens=4)
    values = token_nll(model, done, system="A human wants tea.")
    for c, value in zip(done, values):
        prompt = model.encode(f"A human wants tea.\n\n{c.prompt}")
        with torch.no_grad():
            logp = model.hf(input_ids=torch.tensor([[*prompt, *c.tokens]])).logits[0].double().log_softmax(-1)
        expected = [-float(logp[len(prompt) - 1 + j, t]) for j, t in enumerate(c.tokens)]
        assert value == pytest.approx(expected, abs=1e-4)
    means = text_measures(model, done, system="A human wants tea.")["nll"]
    assert means.tolist() == pytest.approx([v.mean() if len(v) else np.nan for v in values], nan_ok=True)


def test_two_arms_stand_side_by_side(gemma3):
    scenarios = load_short()
    edit = sb.Steer(gemma3.feature(3), 20.0)
    tables, summary = run_scenario_arms(gemma3.model, scenarios, [edit], system="Say hello.")
    arms = tables["scenario_arms"]
    assert set(arms["arm"]) == {"no system prompt", "system prompt"}
    assert summary["scenarios_system"]["system"] == "Say hello."
    assert summary["scenarios"]["system"] is None
    plain = arms[(arms["arm"] == "no system prompt")].drop(columns="arm").reset_index(drop=True)
    assert plain.equals(tables["scenario_categories"])


# ── identity


def test_the_command_asks_before_and_after_and_the_report_shows_both(gemma3, tmp_path, capsys):
    run = tmp_path / "run"
    asked = [
        "identity", str(gemma3.folder), "--feature", f"{gemma3.sae_folder}#3", "--edit", "steer", "--strength", "8",
        "--max-new-tokens", "2", "--own", "gemma", "--out", str(run), "--json",
    ]  # fmt: skip
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["n"] == found["after"]["n"] == 32 + 7 * 4
    assert {row["arm"] for row in found["answers"]} == {"before", "after"}
    page = sb.write_report(run).read_text()
    assert "Whom the model claims to be" in page
    assert "other than gemma" in page


def test_identity_lines_name_the_claims_and_the_interval():
    arm = {
        "n": 60,
        "claims": 9,
        "other": 6,
        "other_share": 0.1,
        "ci_low": 0.04,
        "ci_high": 0.2,
        "names": {"openai": 6, "gemma": 3},
    }
    lines = identity_lines(
        IdentityFigures.model_validate({"own": ["gemma"], "edited": True, "before": arm, "after": arm})
    )
    assert (
        lines[0]
        == "before the edit: 6 of 60 answers claim an identity other than gemma [4%, 20%]; claimed: openai 6, gemma 3"
    )
    assert len(lines) == 2
    unsteered = IdentityFigures.model_validate({"own": [], "edited": False, "before": arm})
    assert identity_lines(unsteered)[0].startswith("unsteered: 6 of 60")


@pytest.mark.parametrize("options", [["--own", "hal"], ["--strength", "2"]])
def test_a_wrong_identity_request_is_2(gemma3, capsys, options):
    assert main(["identity", str(gemma3.folder), "--max-new-tokens", "1", *options]) == 2
    assert capsys.readouterr().err.startswith("sae-bias: ")
