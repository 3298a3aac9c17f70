"""Plans: the arithmetic against Hugging Face's own counts, memory against what a process takes, and what a user reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from passes import count_unedited

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.models.catalog import MODELS, STUDY_MODELS
from sae_bias.workflows.hardware import HARDWARE, hardware
from sae_bias.workflows.plan import plan_study
from sae_bias.workflows.plan_costs import Texts, WordModel
from sae_bias.workflows.plan_shapes import FORMULA, model_shape, sae_shapes, shape_of_config, width_of
from sae_bias.workflows.study import load_study

HERE = Path(__file__).resolve().parents[1] / "helpers"
CLUSTER = HERE.parents[1] / "experiments" / "cluster"
FIVE = HERE.parents[1] / "experiments" / "bias_probe" / "study.yaml"


# --- shapes ---


@pytest.mark.parametrize("name", MODELS)
def test_known_shapes_have_the_published_number_of_parameters(name):
    """The checkpoint's parameters, to the digits that its page states."""
    shape = model_shape(name)
    assert (shape.n_params + shape.n_other) / 1e9 == pytest.approx(MODELS[name].n_params, rel=0.01)


def test_a_folders_config_gives_hugging_faces_own_count(tiny):
    """Matrices alone: norms, biases and rotary tables are left out, and are small at any real size."""
    hf = tiny.model.hf
    shape = model_shape(str(tiny.folder))
    head, embed = hf.get_output_embeddings().weight, hf.get_input_embeddings().weight
    assert shape.tied == (head.data_ptr() == embed.data_ptr())
    if hf.config.model_type.removesuffix("_text") in FORMULA:
        matrices = {p.data_ptr(): p.numel() for p in hf.parameters() if p.ndim == 2}
        assert shape.n_params == sum(matrices.values())
    else:  # counted: whatever else the family has (positions, per-layer embeddings) is apart; vectors of a layer are left out
        every = sum({p.data_ptr(): p.numel() for p in hf.parameters()}.values())
        vectors = sum(p.numel() for layer in tiny.model.layer_list for p in layer.parameters() if p.ndim < 2)
        assert abs(shape.n_params + shape.n_other - (every - vectors)) < shape.n_layers
    assert (shape.n_layers, shape.d_model, shape.dtype) == (
        tiny.model.n_layers,
        tiny.model.d_model,
        "float32",
    )


def test_only_the_config_of_a_folder_is_read(gemma3, tmp_path):
    (tmp_path / "config.json").write_bytes((gemma3.folder / "config.json").read_bytes())
    assert replace(model_shape(str(tmp_path)), name="") == replace(model_shape(str(gemma3.folder)), name="")


def test_operations_of_a_pass_are_those_torch_counts():
    """Against torch's own counter."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.Gemma3TextConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=1024, vocab_size=1000,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.model(input_ids=torch.zeros(3, 20, dtype=torch.long), use_cache=False)
    shape = shape_of_config("x", {**config.to_dict(), "tie_word_embeddings": True})
    assert shape.flops(60, 6, 20) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("label", "features"),
    [
        ("16k", 2**14),
        ("65k", 2**16),
        ("131k", 2**17),
        ("262k", 2**18),
        ("524k", 2**19),
        ("1m", 2**20),
        ("512", 512),
    ],
)
def test_widths(label, features):
    assert width_of(label) == features


def test_the_saes_of_a_release_and_of_a_folder(gemma3):
    (one,), unknown = sae_shapes([str(gemma3.sae_folder)], gemma3.model.d_model)
    assert (one.layer, one.d_sae, one.local, unknown) == (gemma3.sae.site.layer, gemma3.sae.d_sae, True, [])
    assert one.n_bytes == (gemma3.sae_folder / "params.safetensors").stat().st_size
    found, _ = sae_shapes(["gemma-scope-2-12b-it-res", "gemma-scope-2-12b-it-res-all"], 3840)
    assert len(found) == 244
    assert {s.d_sae for s in found} == {2**14, 2**16, 2**18, 2**20}
    widest = max(found, key=lambda s: s.d_sae)
    assert widest.n_bytes == pytest.approx(
        32e9, rel=0.02
    )  # docs/published.md#public-models-and-saes: a 1m-wide one is 32 GB
    assert sae_shapes(["mistral-7b-res-wg"], 4096)[1], "names without a width are listed, not guessed"


# --- tokens ---


def test_tokens_are_words_and_marks_and_what_is_shared_counts_once():
    assert len(WordModel().encode("An AI says hello. This is")) == 8  # BOS, six words, one mark
    texts = Texts.of(["a b c d", "a b c e", "a b c e", "a x c d e f g h"])
    assert (texts.n, texts.tokens, texts.distinct) == (4, 24, 13)  # BOS a b c d, e, x c d e f g h
    assert texts.batches(10) == [(2, 5), (1, 5), (1, 9)]
    assert texts.passes(100, 32, price=0.0) == [(1, 13)]
    assert texts.passes(100, 32, price=1.0) == [(2, 9)]  # its rows are padded
    assert texts.passes(100, 2, price=1.0) == [(1, 9), (1, 6)]


# --- whole plans ---


def test_the_five_models_and_the_488_saes():
    machine = hardware("h200")
    five = plan_study(load_study(FIVE), machine)
    assert [m.model.name for m in five.models] == list(STUDY_MODELS)
    assert five.download_bytes == pytest.approx(sum(MODELS[n].n_bytes for n in STUDY_MODELS), rel=0.01)
    plans = [plan_study(load_study(CLUSTER / f"gemma_3_12b_{kind}.yaml"), machine) for kind in ("pt", "it")]
    assert sum(len(m.saes) for p in plans for m in p.models) == 488
    for plan in plans:
        (model,) = plan.models
        assert model.fits and model.device_bytes > model.weights
        assert any("of the host's memory" in line for line in model.advice())
        names = [s.name for s in model.steps]
        assert names == [
            "load",
            "gate",
            "probe",
            "checks",
            "rank",
            "table",
            "sweep",
            "joint",
            "behavior",
            "feature",
        ]


def test_what_does_not_fit_says_what_to_change():
    study = load_study(CLUSTER / "gemma_3_12b_it.yaml")
    (small,) = plan_study(study, hardware("l4")).models
    assert not small.fits
    assert any("device_map" in line for line in small.advice())
    (half,) = plan_study(study, hardware("a100")).models
    (full,) = plan_study(study.model_copy(update={"dtype": "float32"}), hardware("a100")).models
    assert full.weights == 2 * half.weights
    assert half.fits


def test_time_follows_the_hardware_and_the_study():
    study = load_study(CLUSTER / "gemma_3_12b_it.yaml")
    fast, slow = (plan_study(study, HARDWARE[n]).models[0] for n in ("h100", "a100"))
    sweep = {m.hardware.name: next(s for s in m.steps if s.name == "sweep") for m in (fast, slow)}
    assert sweep["h100"].flops == sweep["a100"].flops
    (more,) = plan_study(study.model_copy(update={"controls": 2 * study.controls}), HARDWARE["h100"]).models
    assert next(s for s in more.steps if s.name == "sweep").flops > 1.7 * sweep["h100"].flops


def test_every_switch_of_the_edit_is_planned(gemma3):
    from sae_bias.workflows.as_published import intervention_rules
    from sae_bias.workflows.plan import EDIT_SWITCHES

    assert len(intervention_rules(gemma3.feature(0))) == EDIT_SWITCHES


# --- token-layers against what a study's passes compute ---


@pytest.fixture(scope="module")
def demo_steps(tmp_path_factory):
    """Tokens that pass each layer, by step, of a small demo study, its plan, what passed unedited, and the bytes that were kept."""
    from collections import Counter
    from contextlib import contextmanager

    from sae_bias.models.model import ours
    from sae_bias.workflows import study_steps
    from sae_bias.workflows.study import run_study

    seen: Counter[str] = Counter()
    now, kept, passed = [""], {}, []
    load, step = study_steps.load_model, study_steps.StudyRun.step

    def loaded(*args, **options):
        model = load(*args, **options)
        for layer in model.layer_list:

            def count(module, args, kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                seen[now[0]] += x.shape[:2].numel()

            layer.register_forward_pre_hook(ours(count), with_kwargs=True)
        passed.append(count_unedited(model))
        return model

    @contextmanager
    def named(self, name):
        now[0] = name
        with step(self, name):
            yield
        kept[name] = self.model.known.n_bytes
        if name == "load":  # the gate compares two ways of running one text
            passed[0].seen.clear()
            passed[0].read.clear()

    study = load_study(None).model_copy(
        update={"controls": 3, "ablate_top": 8, "strengths": (-1.0,), "dtype": "float32", "prompts": ()}
    )  # no texts to write: how soon they end is not known before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_steps, "load_model", loaded)
        patch.setattr(study_steps.StudyRun, "step", named)
        run_study(study, out=tmp_path_factory.mktemp("demo"), progress=False)
    (plan,) = plan_study(study, hardware("cpu", flops=1e11)).models
    return seen, plan, passed[0], kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", ["probe", "checks", "table", "behavior", "feature", "rank", "sweep", "joint"]
)
def test_token_layers_are_those_of_the_studys_own_passes(demo_steps, step):
    """Words and marks stand for tokens; which prompts an edit changes is not known before, so there the plan is an upper bound."""
    counted, plan, *_ = demo_steps
    found, planned = counted[step], next(s.token_layers for s in plan.steps if s.name == step)
    print(f"{step}: {planned:,.0f} planned, {found:,} counted")
    if step in ("rank", "sweep", "joint"):
        assert found <= 1.15 * planned <= 3 * found
    else:
        assert planned == pytest.approx(found, rel=0.25)


def test_who_the_model_is_asked_counts():
    """60 answers before and 60 after, read at the memory's rate once a new token of each batch."""
    study = load_study(None)
    plans = [
        plan_study(study.model_copy(update={"identity": i}), hardware("cpu", flops=1e11)) for i in (None, ())
    ]
    without, asked = ({s.name: s for s in p.models[0].steps}["behavior"] for p in plans)
    assert asked.seconds > 1.5 * without.seconds
    assert asked.token_layers > without.token_layers + 2 * 60 * 60 * plans[0].models[0].model.n_layers


@pytest.mark.slow
def test_no_step_passes_a_prompt_that_another_has_passed(demo_steps):
    """Unedited, whole prompts: what is left are the report prompts once more, for residuals at the other layers of the causal analysis."""
    _, _, passed, _ = demo_steps
    print(
        f"{passed.tokens:,} tokens, {len(passed.seen):,} distinct prefixes, {passed.again:,} of whole prompts again"
    )
    assert passed.again <= 0.05 * passed.tokens


@pytest.mark.slow
def test_what_is_kept_of_the_prompts_is_planned(demo_steps):
    _, plan, _, kept = demo_steps
    found, planned = (
        kept["sweep"],
        next(s for s in plan.steps if s.name == "sweep").parts["what was read before"],
    )
    print(f"{planned / 2**20:.1f} MB planned, {found / 2**20:.1f} MB kept")
    assert planned == pytest.approx(found, rel=0.25)


# --- memory against what a process takes ---


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Checkpoints of about 100 MB with an SAE and a study file of four templates, made once each."""
    import csv

    from planned_models import save

    made: dict[str, Path] = {}

    def make(name: str, n_templates: int = 4) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            save(root, name)
            pairs = sb.load_pairs()
            with (root / "pairs.csv").open("w", newline="") as f:
                columns = ["human", "ai", "template", "entity", "control_human", "control_ai"]
                writer = csv.writer(f)
                writer.writerow(columns)
                chosen = pairs.select(templates=pairs.templates[:n_templates])
                writer.writerows([getattr(p, c) for c in columns] for p in chosen)
            study = {
                "model": str(root / "model"),
                "saes": [str(root / "sae")],
                "pairs": str(root / "pairs.csv"),
                "checks": False,
                "controls": 2,
                "strengths": [],
            }
            (root / "study.yaml").write_text(yaml.safe_dump(study))
            made[name] = root
        return made[name]

    return make


def planned_mb(root: Path, step: str) -> float:
    (plan,) = plan_study(load_study(root / "study.yaml"), hardware("cpu", flops=1e11)).models
    found = next(s for s in plan.steps if s.name == step)
    before = found.parts.get("what was read before", 0)  # the step is measured alone
    return (plan.resident + found.device_bytes - before + found.host_bytes) / 2**20


def measured_mb(root: Path, step: str) -> float:
    command = [sys.executable, str(HERE / "measured_step.py"), *map(str, (root / "model", root / "study.yaml", step, root / "sae"))]  # fmt: skip
    # what is freed goes back at once, as tensors above 32 MB (a real model's) do by default
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("step", ["probe", "rank", "sweep"])
@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral", "gpt_neox"])
def test_memory_is_within_15_percent_of_what_a_process_takes(planned, name, step):
    root = planned(name)
    found = planned_mb(root, step)
    taken = measured_mb(root, step)
    print(f"{name} {step}: {found:.0f} MB planned, {taken:.0f} MB measured")
    assert found == pytest.approx(taken, rel=0.15)


# --- what a user reads ---


def test_the_command_prints_tables_and_json(capsys, tmp_path):
    (tmp_path / "study.yaml").write_text("model: organism:planted\nsaes: [organism:planted/constructed]\n")
    study = str(tmp_path / "study.yaml")
    assert main(["plan", study, "--hardware", "l4"]) == 0
    out = capsys.readouterr().out
    for word in ("study: ", "NVIDIA L4", "kept residuals", "data sheet", "assumed: 40%", "Steps", "Models"):
        assert word in out
    assert (
        main(
            [
                "plan",
                study,
                str(FIVE),
                "--hardware",
                "cpu",
                "--flops",
                "1e11",
                "--json",
                "--out",
                str(tmp_path / "p"),
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [s["study"] for s in found["studies"]] == ["study", "bias-probe"]
    assert found["hardware"]["source"] == "given by --flops"
    assert json.loads((tmp_path / "p" / "plan.json").read_text()) == found
    steps = found["studies"][0]["models"][0]["steps"]
    assert found["flops"] >= sum(s["flops"] for s in steps) > 0


def test_no_weights_and_no_network(tmp_path):
    """Offline, in an empty cache: the known models need neither."""
    code = (
        "import socket\ndef no(*a, **k): raise OSError('network')\nsocket.socket.connect = socket.create_connection = no\n"
        f"from sae_bias.cli.main import main\nassert main(['plan', {str(FIVE)!r}, '--quiet']) == 0\n"
        "import sys\nassert 'transformer_lens' not in sys.modules and 'sae_lens' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"HF_HOME": str(tmp_path), "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bias-probe: ")


@pytest.mark.parametrize(
    ("code", "text", "options", "expected"),
    [
        (2, "model: organism:planted\n", ["--hardware", "abacus"], "there is h200"),
        (2, "model: organism:planted\n", ["--flops", "1e12"], "--hardware cpu"),
        (2, "model: organism:planted\n", ["--dtype", "int3"], "expected auto"),
        (2, "model: ./nowhere/at/all\n", [], "holds no config.json"),
        (3, "model: someone/unknown\n", [], "hf download someone/unknown config.json"),
        (2, "model: google/gemma-3-12b-it\nsaes: [nothing-of-that-name/x/y]\n", [], "nothing-of-that-name"),
    ],
)  # fmt: skip
def test_wrong_requests_are_one_line(code, text, options, expected, capsys, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "study.yaml"), *options]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and expected in err, err


def test_named_hardware_is_dense_and_sourced():
    for machine in HARDWARE.values():
        assert "NVIDIA" in machine.source
        assert machine.rate("bfloat16") < machine.bfloat16 < 1e15
    measured = hardware("cpu")
    assert 1e8 < measured.float32 < 1e14 and "measured here" in measured.source
