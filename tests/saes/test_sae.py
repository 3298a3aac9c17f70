"""SAEs and features by name: from folders, from SAELens, and from a hub that may fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import sae_files
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from tallies import tally

from sae_bias.core.errors import MissingError, RequestError, SaeBiasError
from sae_bias.core.site import Site
from sae_bias.models import catalog
from sae_bias.saes import releases
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_feature, load_sae
from sae_bias.saes.sae import Columns, Feature

WEIGHTS = sae_files.random_sae()
WRONG_TYPE = (RequestError, TypeCheckError)  # run-time type checks, where they are on, come first
FOLDER = "resid_post/layer_31_width_512_l0_medium"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sae_files.write_gemma_scope_2(tmp_path / FOLDER, WEIGHTS, sae_files.gemma_scope_2_config(31))


# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────


def test_encode_is_jumprelu_without_b_dec_and_decode_is_affine(folder: Path) -> None:
    sae = load_sae(folder)
    x = torch.randn(3, 5, sae.d_in)
    acts = sae.encode(x)
    expected = sae_files.reference_acts(WEIGHTS, x)
    assert 0.05 < (expected > 0).float().mean() < 0.5
    torch.testing.assert_close(acts, expected)
    torch.testing.assert_close(sae.decode(acts), expected @ WEIGHTS["w_dec"] + WEIGHTS["b_dec"])
    assert torch.equal(sae.decode(torch.zeros(2, sae.d_sae)), WEIGHTS["b_dec"].expand(2, -1))


def test_streamed_blocks_equal_one_product(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = load_sae(folder), torch.randn(7, 24)
    whole = sae.encode(x)
    monkeypatch.setattr("sae_bias.saes.sae._BLOCK_BYTES", 1)
    assert len(list(sae.blocks())) == 8
    torch.testing.assert_close(sae.encode(x), whole)
    torch.testing.assert_close(sae.decode(whole), whole @ WEIGHTS["w_dec"] + WEIGHTS["b_dec"])


def test_a_feature_alone_activates_as_in_the_whole(folder: Path) -> None:
    sae, x = load_sae(folder), torch.randn(50, 24)
    acts = sae.encode(x)
    for index in (0, 99, 511):
        feature = load_feature(f"{folder}#{index}")
        torch.testing.assert_close(feature.activation(x), acts[:, index])
        assert feature.activation(x.to(torch.bfloat16)).dtype == torch.float32


def test_a_feature_is_frozen_and_names_itself(folder: Path) -> None:
    feature = load_feature(f"{folder}#446")
    assert str(feature) == str(feature.ref) == f"{folder}#446"
    assert (feature.index, feature.d_model, feature.site) == (446, 24, Site(31))
    assert feature.to("cpu") is feature
    with pytest.raises(dataclasses.FrozenInstanceError):
        feature.site = Site(1)  # pyright: ignore[reportAttributeAccessIssue]
    assert as_feature(feature) is feature
    assert as_feature(feature.ref).ref == as_feature(str(feature)).ref == feature.ref


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "release", "sae_id"),
    [
        ("gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium", "gemma-scope-2-12b-it-res", "layer_31_width_65k_l0_medium"),
        ("gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68", "gemma-scope-9b-pt-res", "layer_20/width_16k/average_l0_68"),
        ("organism:planted/resid_post/layer_2_width_512_l0_small", "organism:planted", "resid_post/layer_2_width_512_l0_small"),
        ("organism:planted/constructed", "organism:planted", "constructed"),
        ("google/gemma-scope-2-12b-it/resid_post/layer_31", "google/gemma-scope-2-12b-it", "resid_post/layer_31"),
        ("runs/x/resid_post/layer_2_width_512_l0_small", "runs/x/resid_post", "layer_2_width_512_l0_small"),
        ("/data/layer_20/width_16k/average_l0_71", "/data", "layer_20/width_16k/average_l0_71"),
        ("/sae", "/", "sae"),
        ("./sae/", ".", "sae"),
    ],
)  # fmt: skip
def test_names_split_at_the_release_and_come_back(text: str, release: str, sae_id: str) -> None:
    parsed = SaeId.parse(text)
    assert (parsed.release, parsed.sae_id) == (release, sae_id)
    assert str(parsed) == text.rstrip("/")
    ref = FeatureRef.parse(f"{text.rstrip('/')}#2511")
    assert ref == FeatureRef(parsed, 2511)
    assert FeatureRef.parse(str(ref)) == ref


def test_a_bare_folder_name_and_a_trailing_slash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in (folder.name, f"{folder.name}/", f"./{folder.name}", f"../resid_post/{folder.name}"):
        sae = load_sae(name)
        again = load_feature(str(FeatureRef(sae.id, 3)))
        assert torch.equal(again.w_dec, WEIGHTS["w_dec"][3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "no SAE release 'nonsense'"),
        ("gemma-scope-2-12b-it-ress/layer_31_width_65k_l0_medium", "did you mean gemma-scope-2-12b-it-res"),
        ("gemma-scope-2-12b-it-res/layer_31_width_65k_l0_med", "did you mean layer_31_width_65k_l0_medium"),
        ("gemma-scope-2-12b-it-res", "which SAE of it"),
        ("gemma-scope-9b-pt-att/layer_0/width_16k/average_l0_122", "no SAE"),
        ("google/gemma-scope-2-4b-it/transcoder_all/layer_5_width_16k_l0_big", "only SAEs, which write to the place they read"),
        ("google/gemma-scope-2-4b-it/resid_post/../../secret", "no '..'"),
        ("gemma-scope-2-12b-it-res/../x", "no '..'"),
        ("organism:planted/../../model", "no '..'|no bundled organism"),
        ("organism:nobody/constructed", "no bundled organism 'nobody'"),
        ("organism:../planted/constructed", "no bundled organism"),
        ("/no/such/folder", "no folder '/no/such/folder'"),
        ("~/no/such/folder", "no folder"),
        ("a/b/c", "no folder 'a/b/c'"),
        ("", "expected e.g."),
        ("x\0y", "expected e.g."),
        ("gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium#3", "names a feature"),
        (12, "cannot be a int"),
    ],
)  # fmt: skip
def test_names_that_are_wrong(name: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_sae(name)  # pyright: ignore[reportArgumentType]


def test_saes_of_an_organism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_ORGANISMS", tmp_path)
    (tmp_path / "tiny" / "model").mkdir(parents=True)
    for name in ("resid_post/layer_2_width_512_l0_small", "constructed"):
        config = sae_files.gemma_scope_2_config(2, model_name="organism:tiny")
        sae_files.write_gemma_scope_2(tmp_path / "tiny" / "sae" / name, WEIGHTS, config)
    assert catalog.organism_names() == ["tiny"]
    names = releases.organism_saes("tiny")
    assert names == ["organism:tiny/constructed", "organism:tiny/resid_post/layer_2_width_512_l0_small"]
    for name in names:
        sae = load_sae(name)
        assert (str(sae.id), sae.site, sae.model_name) == (name, Site(2), "organism:tiny")
        assert str(load_feature(f"{name}#446").ref) == f"{name}#446"
    with pytest.raises(RequestError, match="it has organism:tiny/constructed"):
        load_sae("organism:tiny/nothing")
    with pytest.raises(RequestError, match="is a model; its SAEs are"):
        load_sae("organism:tiny")


@pytest.mark.parametrize("index", ["512", "99999999999"])
def test_an_index_beyond_the_width(folder: Path, index: str) -> None:
    with pytest.raises(RequestError, match="it has 512 features, 0 to 511"):
        load_feature(f"{folder}#{index}")


@pytest.mark.parametrize(
    "text", ["x#", "x#-1", "x#1.0", "x#ten", "x#1 2", "x#٣", "x#" + "9" * 5000, "#3", "x", ""]
)
def test_an_index_that_is_no_number(text: str) -> None:
    with pytest.raises(RequestError, match="feature"):
        FeatureRef.parse(text)


@pytest.mark.parametrize("index", [-1, 1.5, "3", None, True])
def test_a_reference_checks_its_index(index: object) -> None:
    with pytest.raises(WRONG_TYPE):
        FeatureRef(SaeId("r", "s"), index)  # pyright: ignore[reportArgumentType]


def test_a_bare_index_is_no_feature() -> None:
    with pytest.raises(WRONG_TYPE):
        as_feature(2511)  # pyright: ignore[reportArgumentType]


@given(st.text(max_size=40))
def test_any_text_as_a_name(name: str) -> None:
    for read in (load_sae, load_feature, SaeId.parse, FeatureRef.parse, Site.parse):
        with contextlib.suppress(SaeBiasError):
            read(name)


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("blocks.31.hook_resid_post", 31), ("blocks.31.hook_out", 31), ("model.layers.31.output", 31), (31, 31), ("31", 31),
        ("blocks.32.hook_resid_pre", 31), ("gpt_neox.layers.4", 4), ("transformer.h.4", 4), (Site(4), 4),
        ("model.language_model.layers.12.output", 12),
    ],
)  # fmt: skip
def test_sites(text: str | int | Site, layer: int) -> None:
    assert Site.parse(text) == Site(layer)
    assert str(Site.parse(text)) == f"blocks.{layer}.hook_resid_post"


@pytest.mark.parametrize(
    "text", ["blocks.3.hook_mlp_in", "blocks.0.hook_resid_pre", "", "layer 3", -1, "blocks.-1.hook_out"]
)
def test_other_sites_are_refused(text: str | int) -> None:
    with pytest.raises(RequestError):
        Site.parse(text)


def test_the_published_saes_of_the_12b_are_listed_without_a_network() -> None:
    for kind in ("pt", "it"):
        names = releases.residual_saes(f"google/gemma-3-12b-{kind}")
        assert len(set(names)) == 244
        layers = {int(name.split("layer_")[1].split("_")[0]) for name in names}
        assert layers == set(range(48))
    assert all(releases.residual_saes(name) for name, info in catalog.MODELS.items() if info.sae_releases)
    assert set(catalog.STUDY_MODELS) <= set(catalog.MODELS)


# ── SAELens ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
@pytest.mark.parametrize("subtract", [True, False])
def test_a_saelens_folder_encodes_as_saelens_does(tmp_path: Path, architecture: str, subtract: bool) -> None:
    from sae_lens import SAE

    folder = sae_files.write_saelens(tmp_path / "sae", WEIGHTS, architecture, apply_b_dec_to_input=subtract)
    sae, lens = load_sae(folder), SAE.load_from_disk(folder)
    assert sae.lens is None
    assert sae.reduces_to_one_row
    assert (sae.site, sae.architecture, sae.model_name) == (Site(3), architecture, "test-model")
    x = torch.randn(40, 24)
    with torch.no_grad():
        expected = lens.encode(x)
        torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(expected), lens.decode(expected), rtol=1e-5, atol=1e-5)
    wrapped = load_sae(lens)
    assert wrapped.reduces_to_one_row
    torch.testing.assert_close(wrapped.encode(x), sae.encode(x))
    torch.testing.assert_close(wrapped.feature(9).w_enc, sae.feature(9).w_enc)


def saelens_sae(architecture: str, **options: object) -> object:
    """A small random SAELens SAE of an architecture."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    metadata = SAEMetadata(hook_name="blocks.3.hook_resid_post", model_name="test-model")
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=24, d_sae=64, metadata=metadata, **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.2)
    return sae


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("topk", {"k": 5}),
        ("gated", {}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_saes_that_need_the_whole_take_the_full_path(
    tmp_path: Path, architecture: str, options: dict[str, object]
) -> None:
    lens = saelens_sae(architecture, **options)
    x = torch.randn(20, 24)
    with torch.no_grad():
        expected = lens.encode(x)  # pyright: ignore[reportAttributeAccessIssue]
        decoded = lens.decode(expected)  # pyright: ignore[reportAttributeAccessIssue]
    lens.save_model(tmp_path / "sae")  # pyright: ignore[reportAttributeAccessIssue]
    for sae in (load_sae(lens), load_sae(tmp_path / "sae")):  # pyright: ignore[reportArgumentType]
        assert not sae.reduces_to_one_row
        assert sae.architecture == architecture
        torch.testing.assert_close(sae.encode(x), expected)
        torch.testing.assert_close(sae.decode(sae.encode(x), x), decoded)
        torch.testing.assert_close(sae.feature(3).activation(x), expected[:, 3])


def test_transcoders_and_other_hooks_of_saelens_are_refused(tmp_path: Path) -> None:
    for name, changes in {
        "transcoder": {"architecture": "jumprelu_transcoder"},
        "mlp": {"metadata": {"hook_name": "blocks.3.hook_mlp_in"}},
        "out": {
            "metadata": {"hook_name": "blocks.3.hook_resid_post", "hook_name_out": "blocks.3.hook_mlp_out"}
        },
        "none": {"metadata": {}},
        "width": {"d_sae": 511},
    }.items():
        folder = sae_files.write_saelens(tmp_path / name, WEIGHTS)
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(RequestError):
            load_sae(folder)


def test_a_folder_without_an_sae(tmp_path: Path) -> None:
    (tmp_path / "layer_3_width_16k").mkdir()
    with pytest.raises(RequestError, match=r"no SAE in .* \(its folders: layer_3_width_16k\)"):
        load_sae(tmp_path)


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────

GEMMA_2 = ("google/gemma-scope-2b-pt-res", "layer_20/width_4k/average_l0_71")
GEMMA_3 = ("google/gemma-scope-2-1b-it", "resid_post/layer_13_width_16k_l0_medium", "gemma-scope-2-1b-it-res")
NARROW, WIDE = (2304, 4096), (8, 16384)  # SAELens insists on d_in 2304 for a Gemma Scope 1 SAE of the 2B


def run(code: str, environment: dict[str, str], *arguments: str) -> dict[str, object]:
    """Run code in a fresh Python process with this environment; it prints one JSON object last."""
    tests = Path(__file__).resolve().parents[1] / "helpers"
    paths = os.pathsep.join([str(tests), str(tests.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's content: one Gemma Scope 1 and three Gemma Scope 2 SAEs, of real widths but eight dimensions."""
    root = tmp_path_factory.mktemp("hub")
    sae_files.write_gemma_scope_1(root / GEMMA_2[0] / GEMMA_2[1], sae_files.random_sae(*NARROW, seed=1))
    weights = sae_files.random_sae(*WIDE, seed=1)
    config = sae_files.gemma_scope_2_config(13, WIDE[1], model_name="gemma-v3-1b-it")
    sae_files.write_gemma_scope_2(root / GEMMA_3[0] / GEMMA_3[1], weights, config)
    sae_files.write_gemma_scope_2(root / GEMMA_3[0] / "resid_post/layer_17_width_16k_l0_medium", weights)
    return root


SAELENS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_bias.saes.load import load_sae
out = {}
for name in sys.argv[1:]:
    parts = name.split("/")
    at = 2 if parts[0] == "google" else 1
    converter = NAMED_PRETRAINED_SAE_LOADERS["gemma_2"] if at == 2 else None
    lens = SAE.from_pretrained("/".join(parts[:at]), "/".join(parts[at:]), converter=converter)
    sae = load_sae(name)
    block = sae.columns(0, sae.d_sae)
    x = torch.randn(4, sae.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out[name] = {
            "equal": [
                torch.equal(block.w_enc, lens.W_enc), torch.equal(block.b_enc, lens.b_enc),
                torch.equal(block.threshold, lens.threshold), torch.equal(sae.b_dec, lens.b_dec),
                torch.equal(sae.W_dec_rows(range(sae.d_sae)), lens.W_dec),
                torch.equal(sae.feature(2511).w_enc, lens.W_enc[:, 2511]),
                torch.equal(sae.feature(2511).w_dec, lens.W_dec[2511]),
            ],
            "encode": float((sae.encode(x) - lens.encode(x)).abs().max()),
            "site": [str(sae.site), lens.cfg.metadata.hook_name], "model": [sae.model_name, lens.cfg.metadata.model_name],
            "id": str(sae.id), "notes": sae.notes,
        }
print(json.dumps(out))
"""

OURS = """
import json, sys
from sae_bias.saes.load import load_sae
out = {}
for name in sys.argv[1:]:
    sae = load_sae(name)
    feature = sae.feature(2511)
    out[name] = [str(sae.site), sae.d_sae, float(feature.w_enc.sum()), float(feature.w_dec.sum()), sae.notes]
assert "sae_lens" not in sys.modules
print(json.dumps(out))
"""


NAMES = [f"{GEMMA_2[0]}/{GEMMA_2[1]}", f"{GEMMA_3[2]}/{GEMMA_3[1].split('/')[1]}"]
"""A Gemma Scope 1 SAE by repository and a Gemma Scope 2 SAE by SAELens release."""


def test_files_load_bit_for_bit_as_saelens_loads_them(hub_root: Path, tmp_path: Path) -> None:
    with hub_server.HubServer(hub_root) as server:
        result = run(SAELENS, server.environment(tmp_path), *NAMES)
    for name in NAMES:
        found = result[name]
        assert all(found["equal"]), name  # pyright: ignore[reportIndexIssue]
        assert found["encode"] < 1e-5  # pyright: ignore[reportIndexIssue]
        site, hook = found["site"]  # pyright: ignore[reportIndexIssue]
        assert site == hook
        assert found["id"] == name  # pyright: ignore[reportIndexIssue]
    ours, theirs = result[NAMES[1]]["model"]  # pyright: ignore[reportIndexIssue]
    assert ours == theirs == "google/gemma-3-1b-it"


def test_files_load_again_with_the_server_gone_and_no_network(hub_root: Path, tmp_path: Path) -> None:
    raw = [f"{GEMMA_3[0]}/{GEMMA_3[1]}", f"{GEMMA_3[0]}/resid_post/layer_17_width_16k_l0_medium"]
    names = [*NAMES, *raw]
    with hub_server.HubServer(hub_root) as server:
        environment = server.environment(tmp_path)
        online = run(OURS, environment, *names)
        n_requests = len(server.requests)
        assert run(OURS, environment, *names) == online
        assert len(server.requests) == n_requests, "a cached file was asked for again"
    assert run(OURS, {**environment, "HF_HUB_OFFLINE": "1"}, *names) == online
    assert online[raw[1]][4] == ["layer and hook point taken from the folder name"]  # pyright: ignore[reportIndexIssue]
    assert not online[raw[0]][4]  # pyright: ignore[reportIndexIssue]


FAULTY = """
import json, os, sys, time, tempfile
from pathlib import Path
import hub_server
root, home, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
server = hub_server.HubServer(root)
server.__enter__()
os.environ.update(server.environment(home))
from huggingface_hub import constants
from sae_bias.core.errors import SaeBiasError
from sae_bias.saes.load import load_sae
time.sleep = lambda seconds: None  # the client waits between its retries; the tests need not
out = {}
for case in json.loads(sys.argv[4]):
    constants.HF_HUB_CACHE = str(home / case["label"])
    server.fail(case["kind"], case.get("path", ""), case.get("times"), case.get("method"))
    try:
        first = float(load_sae(name).feature(2511).w_enc.sum())
    except SaeBiasError as error:
        first = [error.exit_code, str(error)]
    server.heal()
    out[case["label"]] = {"first": first, "then": float(load_sae(name).feature(2511).w_enc.sum())}
server.__exit__(None, None, None)
print(json.dumps(out))
"""

FAULTS = {
    "gated": (
        {"kind": "gated"},
        "is gated: accept the license at https://huggingface.co/google/gemma-scope-2-1b-it",
    ),
    "forbidden": ({"kind": "403"}, "hf auth login"),
    "unauthorised": ({"kind": "401"}, "hf auth login"),
    "no such file": ({"kind": "404", "path": "params"}, "has no such file"),
    "slow down": ({"kind": "429"}, "slow down (429)"),
    "server error": ({"kind": "500"}, "answered 500"),
    "server error on the body": ({"kind": "500", "path": "params", "method": "GET"}, "answered 500"),
    "truncated": ({"kind": "truncated", "path": "params"}, "did not finish"),
    "connection cut": ({"kind": "cut", "path": "params"}, "did not finish"),
    "checksum": ({"kind": "checksum", "path": "params"}, "checksum is wrong"),
    "one 429": ({"kind": "429", "path": "params", "times": 1, "method": "GET"}, None),
    "one cut": ({"kind": "cut", "path": "params", "times": 1, "method": "GET"}, None),
}


def test_every_fault_of_the_hub_is_one_line_and_never_poisons_the_cache(
    hub_root: Path, tmp_path: Path
) -> None:
    cases = [{"label": label, **case} for label, (case, _) in FAULTS.items()]
    name = f"{GEMMA_3[0]}/{GEMMA_3[1]}"
    result = run(FAULTY, {}, str(hub_root), str(tmp_path), name, json.dumps(cases))
    tally("faults of the hub injected", len(FAULTS))
    (good,) = {found["then"] for found in result.values()}  # pyright: ignore[reportIndexIssue]
    for label, (_, message) in FAULTS.items():
        first = result[label]["first"]  # pyright: ignore[reportIndexIssue]
        if message is None:
            assert first == good, (label, first)
        else:
            assert isinstance(first, list), (label, first)
            assert first[0] == MissingError.exit_code, first
            assert message in first[1], (label, first)
            assert "\n" not in first[1]


def test_uncached_and_offline_says_what_to_download(tmp_path: Path) -> None:
    code = """
import json, sys
from sae_bias.core.errors import MissingError
from sae_bias.saes.load import load_sae
out = {}
for name in sys.argv[1:]:
    try:
        load_sae(name)
    except MissingError as error:
        out[name] = str(error)
print(json.dumps(out))
"""
    names = [
        "gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium",
        "gemma-scope-9b-pt-res-canonical/layer_20/width_16k/canonical",
    ]
    found = run(code, {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, *names)
    folder = "resid_post/layer_31_width_65k_l0_medium"
    assert f"hf download google/gemma-scope-2-12b-it --include '{folder}/*'" in str(found[names[0]])
    assert "layer_20/width_16k/average_l0_" in str(found[names[1]])


@pytest.mark.slow
def test_other_releases_go_through_saelens(tmp_path: Path) -> None:
    release = releases.sae_release("gemma-2b-res-jb")
    sae_id, folder = next(iter(release.folders.items()))
    sae_files.write_saelens(tmp_path / "hub" / release.repo_id / folder, WEIGHTS, "standard")
    name = f"gemma-2b-res-jb/{sae_id}"
    code = """
import json, sys
from sae_bias.core.errors import SaeBiasError
from sae_bias.saes.load import load_sae
try:
    sae = load_sae(sys.argv[1])
    print(json.dumps({"id": str(sae.id), "d_sae": sae.d_sae, "plain": sae.reduces_to_one_row}))
except SaeBiasError as error:
    print(json.dumps({"error": error.exit_code, "message": str(error)}))
"""
    with hub_server.HubServer(tmp_path / "hub") as server:
        environment = server.environment(tmp_path / "home")
        assert run(code, environment, name) == {"id": name, "d_sae": 512, "plain": True}
    assert run(code, {**environment, "HF_HUB_OFFLINE": "1"}, name)["d_sae"] == 512
    missing = run(code, {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}, name)
    assert missing["error"] == MissingError.exit_code


def test_columns_is_a_named_triple(folder: Path) -> None:
    block = load_sae(folder).columns(3, 5)
    assert isinstance(block, Columns)
    assert isinstance(load_feature(f"{folder}#3"), Feature)
    with pytest.raises(RequestError, match="columns 510:513"):
        load_sae(folder).columns(510, 513)
