"""Gemma Scope files: slices equal the whole, lying files are refused, and nothing else ever leaves a reader."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sae_files
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tallies import tally

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.site import Site
from sae_bias.saes.formats.gemma_scope import read_encoder_file, read_info, read_label
from sae_bias.saes.load import load_feature, load_sae
from sae_bias.saes.tensors import open_tensor_file

WEIGHTS = sae_files.random_sae()
FOLDER_2 = "resid_post/layer_31_width_512_l0_medium"
FOLDER_1 = "layer_20/width_512/average_l0_71"


def write(root: Path, layout: str) -> Path:
    """WEIGHTS in one of the layouts."""
    if layout.startswith("npz"):
        order = "F" if layout.endswith("fortran") else "C"
        return sae_files.write_gemma_scope_1(root / FOLDER_1, WEIGHTS, "compressed" in layout, order)
    return sae_files.write_gemma_scope_2(root / FOLDER_2, WEIGHTS, sae_files.gemma_scope_2_config(31))


LAYOUTS = ("safetensors", "npz", "npz compressed", "npz fortran", "npz compressed fortran")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_equal_the_whole(tmp_path: Path, layout: str) -> None:
    sae = load_sae(write(tmp_path, layout))
    for index in (0, 7, 511):
        feature = sae.feature(index)
        assert torch.equal(feature.w_enc, WEIGHTS["w_enc"][:, index])
        assert torch.equal(feature.w_dec, WEIGHTS["w_dec"][index])
        assert torch.equal(feature.b_enc, WEIGHTS["b_enc"][index])
        assert torch.equal(feature.threshold, WEIGHTS["threshold"][index])
    block = sae.columns(100, 228)
    assert torch.equal(block.w_enc, WEIGHTS["w_enc"][:, 100:228])
    assert torch.equal(block.threshold, WEIGHTS["threshold"][100:228])
    assert torch.equal(sae.W_dec_rows([5, 6, 7, 3, 511]), WEIGHTS["w_dec"][[5, 6, 7, 3, 511]])
    assert torch.equal(sae.b_dec, WEIGHTS["b_dec"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtypes_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = load_sae(sae_files.write_gemma_scope_2(tmp_path / FOLDER_2, WEIGHTS, dtype=dtype))
    feature = sae.feature(12)
    assert feature.w_enc.dtype == torch.float32
    assert torch.equal(feature.w_enc, WEIGHTS["w_enc"].to(dtype).float()[:, 12])
    assert torch.equal(feature.w_dec, WEIGHTS["w_dec"].to(dtype).float()[12])


def test_config_and_folder_name_give_layer_model_and_l0(tmp_path: Path) -> None:
    sae = load_sae(write(tmp_path, "safetensors"))
    assert (sae.site, sae.model_name, sae.label_l0) == (Site(31), "google/gemma-3-12b-it", 60.0)
    assert str(sae.site) == "blocks.31.hook_resid_post"
    assert not sae.notes
    sae = load_sae(write(tmp_path, "npz"))
    assert (sae.site, sae.label_l0, sae.id.sae_id) == (Site(20), 71.0, FOLDER_1)
    assert "folder name" in sae.notes[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "google/gemma-scope-2-12b-it/resid_post/layer_31_width_65k_l0_medium",
            (31, "65k", None, "resid_post"),
        ),
        ("g/resid_post_all/layer_0_width_262k_l0_big", (0, "262k", None, "resid_post")),
        ("g/resid_post/layer_12_width_262k_l0_medium_seed_1", (12, "262k", None, "resid_post")),
        ("google/gemma-scope-9b-pt-res/layer_20/width_1m/average_l0_71", (20, "1m", 71.0, "res")),
        ("google/gemma-scope-9b-pt-mlp/layer_20/width_16k/average_l0_7", (20, "16k", 7.0, "mlp")),
        (
            "google/gemma-scope-2-4b-it/transcoder_all/layer_5_width_16k_l0_big_affine",
            (5, "16k", None, "transcoder"),
        ),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", (None, "4k", 6.0, "embedding")),
        ("somewhere/constructed", (None, None, None, None)),
    ],
)
def test_labels(name: str, expected: tuple[object, ...]) -> None:
    label = read_label(name)
    assert (label.layer, label.width, label.l0, label.kind) == expected


# ── what must agree ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hf_hook_point_in": "model.layers.30.output", "hf_hook_point_out": None}, "says layer 30"),
        ({"width": 1024}, "512 features"),
        ({"affine_connection": True}, "transcoder"),
        ({"type": "transcoder"}, "transcoder"),
        ({"hf_hook_point_out": "model.layers.31.post_feedforward_layernorm.output"}, "transcoder"),
        (
            {"hf_hook_point_in": "model.layers.31.self_attn.o_proj.input", "hf_hook_point_out": None},
            "folder name says resid_post",
        ),
        ({"architecture": "topk"}, "topk"),
        ({"l0": "many"}, "expected a number"),
        ({"model_name": 3}, "expected text"),
    ],
)
def test_contradictions_and_other_kinds_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = sae_files.gemma_scope_2_config(31, **changes)
    folder = sae_files.write_gemma_scope_2(tmp_path / FOLDER_2, WEIGHTS, config)
    with pytest.raises(RequestError, match=message):
        load_sae(folder)


def test_width_of_the_folder_name_must_fit_the_file(tmp_path: Path) -> None:
    folder = sae_files.write_gemma_scope_2(tmp_path / "resid_post/layer_31_width_65k_l0_medium", WEIGHTS)
    with pytest.raises(RequestError, match="says 65k"):
        load_sae(folder)


def test_a_folder_that_names_no_layer_needs_a_config(tmp_path: Path) -> None:
    folder = sae_files.write_gemma_scope_2(tmp_path / "constructed", WEIGHTS)
    with pytest.raises(RequestError, match="which layer"):
        load_sae(folder)
    sae_files.write_gemma_scope_2(folder, WEIGHTS, sae_files.gemma_scope_2_config(2))
    assert load_sae(folder).site == Site(2)


@pytest.mark.parametrize("kind", ["crosscoder", "transcoder_all", "clt"])
def test_other_hook_points_are_refused_by_folder_name(tmp_path: Path, kind: str) -> None:
    folder = sae_files.write_gemma_scope_2(tmp_path / kind / "layer_3_width_512_l0_big", WEIGHTS)
    with pytest.raises(RequestError, match="only SAEs, which write to the place they read"):
        load_sae(folder)


def test_a_transcoder_is_known_by_its_shapes(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "w_dec": torch.randn(512, 30), "b_dec": torch.randn(30)}
    with pytest.raises(RequestError, match="transcoder"):
        load_sae(sae_files.write_gemma_scope_2(tmp_path / "layer_3_width_512", weights))
    weights = {**WEIGHTS, "affine_skip_connection": torch.randn(24, 24)}
    with pytest.raises(RequestError, match="affine skip"):
        load_sae(sae_files.write_gemma_scope_2(tmp_path / "layer_4_width_512", weights))


def test_bad_shapes_dtypes_and_missing_tensors(tmp_path: Path) -> None:
    def load(**changes: torch.Tensor | None) -> None:
        weights = {name: tensor for name, tensor in {**WEIGHTS, **changes}.items() if tensor is not None}
        (tmp_path / "layer_3").mkdir(exist_ok=True)
        save_file(weights, tmp_path / "layer_3/params.safetensors")
        load_sae(tmp_path / "layer_3")

    with pytest.raises(RequestError, match=r"b_enc has shape \[511\]"):
        load(b_enc=torch.zeros(511))
    with pytest.raises(RequestError, match="no threshold"):
        load(threshold=None)
    with pytest.raises(RequestError, match="w_dec has dtype I64"):
        load(w_dec=torch.zeros(512, 24, dtype=torch.int64))
    with pytest.raises(RequestError, match="expected \\[d_in, d_sae\\]"):
        load(w_enc=torch.zeros(512))


# ── damaged and lying files ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["w_enc", "w_dec", "threshold", "b_enc"])
def test_nan_is_found_and_named(tmp_path: Path, layout: str, name: str) -> None:
    weights = {key: tensor.clone() for key, tensor in WEIGHTS.items()}
    weights[name].view(-1)[-1] = float("nan") if "npz" in layout else float("inf")
    write_layout = sae_files.write_gemma_scope_1 if "npz" in layout else sae_files.write_gemma_scope_2
    sae = load_sae(write_layout(tmp_path / FOLDER_1, weights))
    with pytest.raises(RequestError, match=f"(?i){name} holds NaN or infinite"):
        sae.feature(511)
    sae.feature(510)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, layout: str, keep: float) -> None:
    folder = write(tmp_path, layout)
    params = next(folder.glob("params.*"))
    size = params.stat().st_size
    os.truncate(params, int(keep * size) if keep < 1 else int(keep))
    with pytest.raises(RequestError):
        load_sae(folder).feature(511)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    folder = write(tmp_path, "safetensors")
    sae = load_sae(folder)
    os.truncate(folder / "params.safetensors", 1000)
    with pytest.raises(RequestError, match="changed size"):
        sae.feature(3)


def lying_header(**entries: object) -> bytes:
    """A safetensors file whose header says what it is told, over 64 bytes of data."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def entry(dtype: object = "F32", shape: object = (16,), offsets: object = (0, 64)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lying_header(w_enc=entry(offsets=(0, 128), shape=(32,))), "cut short"),
        (lying_header(a=entry(), b=entry()), "overlaps"),
        (lying_header(a=entry(offsets=(0, 32), shape=(8,)), b=entry(offsets=(48, 64), shape=(4,))), "gap"),
        (lying_header(a=entry(offsets=(-64, 0))), "whole numbers"),
        (lying_header(a=entry(shape=(-16,))), "whole numbers"),
        (lying_header(a=entry(shape=(True,))), "whole numbers"),
        (lying_header(a=entry(shape=(1 << 60, 1 << 60))), "whole numbers"),
        (lying_header(a=entry(shape=(17,))), "takes 68 bytes"),
        (lying_header(a=entry(dtype="F33")), "unknown dtype"),
        (lying_header(a=entry(dtype=["F32"])), "unknown dtype"),
        (lying_header(a="weights"), "expected dtype, shape"),
        (lying_header(a=entry(shape=(8,), offsets=(0, 32))), "longer than"),
        ((1 << 62).to_bytes(8, "little") + bytes(64), "header of"),
        ((1 << 19).to_bytes(8, "little") + bytes(64), "the header needs"),
        ((8).to_bytes(8, "little") + b"not json" + bytes(8), "not valid JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((20).to_bytes(8, "little") + b'{"a": 1,      "a":2}', "twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "Git LFS"),
    ],
)
def test_lying_safetensors_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "params.safetensors").write_bytes(data)
    with pytest.raises(RequestError, match=message):
        open_tensor_file(tmp_path / "params.safetensors")


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.path, "boom"))


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "layer_3"
    folder.mkdir()
    objects = np.array([Bomb(tmp_path / "boom")], dtype=object)
    np.savez(folder / "params.npz", W_enc=objects, **{key: value.numpy() for key, value in WEIGHTS.items()})
    with pytest.raises(RequestError, match="pickle"):
        load_sae(folder)
    (folder / "params.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(RequestError, match="not a readable"):
        load_sae(folder)
    (folder / "params.npz").rename(folder / "ae.pt")
    with pytest.raises(RequestError, match=r"ae.pt is a pickle"):
        load_sae(folder)
    assert not (tmp_path / "boom").exists()


def test_lying_npz_archives(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"

    def npz(header: str, n_bytes: int = 64, name: str = "a.npy", twice: bool = False) -> None:
        text = header.encode().ljust(118) + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            for _ in range(1 + twice):
                archive.writestr(
                    name, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(n_bytes)
                )

    def header(shape: str, descr: str = "<f4") -> str:
        return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}"

    npz(header("16,"))
    assert open_tensor_file(path).vector("a").tolist() == [0.0] * 16
    for text, message in (
        (header("32,"), "takes 128 bytes"),
        (header("-1,"), "expected one plain numeric array"),
        (header("16,", "|O"), "pickle"),
        ("__import__('os').abort()", "expected one plain numeric array"),
        (header("99999999999999999,"), "expected one plain numeric array"),
    ):
        npz(text)
        with pytest.raises(RequestError, match=message):
            open_tensor_file(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        npz(header("16,"), twice=True)
    with pytest.raises(RequestError, match="two arrays"):
        open_tensor_file(path)


# ── only our errors leave a reader ───────────────────────────────────────────────────────────────────────────────


def use(folder: Path) -> None:
    """Load the SAE of a folder and read from every tensor; any error must be ours."""
    try:
        sae = load_sae(folder)
        sae.feature(0)
        sae.encode(torch.ones(2, sae.d_in))
        sae.decode(torch.ones(1, sae.d_sae))
    except SaeBiasError as error:
        message = str(error)
        assert message
        assert "\n" not in message[:400]


SMALL = sae_files.random_sae(4, 8)
FUZZED = (
    "params.safetensors",
    "params.npz",
    "compressed.npz",
    "config.json",
    "cfg.json",
    "sae_weights.safetensors",
)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one good file of each kind."""
    root = tmp_path_factory.mktemp("good")
    sae_files.write_gemma_scope_2(root, SMALL, sae_files.gemma_scope_2_config(2, 8))
    sae_files.write_saelens(root, SMALL)
    sae_files.write_gemma_scope_1(root, SMALL, compressed=True)
    (root / "params.npz").rename(root / "compressed.npz")
    sae_files.write_gemma_scope_1(root, SMALL)
    return {path.name: path.read_bytes() for path in root.iterdir()}


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, str, list[tuple[float, bytes]]]:
    """Which file, how, and what is put where (positions as a share of the length, near the header more often)."""
    position = st.one_of(st.floats(0, 1), st.floats(0, 0.1))
    edits = draw(st.lists(st.tuples(position, st.binary(min_size=0, max_size=12)), min_size=1, max_size=6))
    return (
        draw(st.sampled_from(FUZZED)),
        draw(st.sampled_from(["overwrite", "insert", "cut", "replace"])),
        edits,
    )


def damaged(data: bytes, how: str, edits: list[tuple[float, bytes]]) -> bytes:
    for share, piece in edits:
        at = int(share * len(data))
        if how == "overwrite":
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == "insert":
            data = data[:at] + piece + data[at:]
        elif how == "cut":
            data = data[:at] + data[at + len(piece) :]
        else:
            data = piece * 9
    return data


def check_damage(
    files: dict[str, bytes], folder: Path, case: tuple[str, str, list[tuple[float, bytes]]]
) -> None:
    name, how, edits = case
    tally("inputs fuzzed, damaged SAE files (hypothesis)")
    folder = folder / "layer_2"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    if name in ("cfg.json", "sae_weights.safetensors"):
        together = ["cfg.json", "sae_weights.safetensors"]
    elif name.endswith(".npz"):
        together = [name]
    else:
        together = ["params.safetensors", "config.json"]
    for other in together:
        data = damaged(files[other], how, edits) if other == name else files[other]
        (folder / other.replace("compressed", "params")).write_bytes(data)
    use(folder)


FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(FUZZ, max_examples=300)
@given(damage())
def test_only_our_errors_leave_a_reader(
    small_files: dict[str, bytes], tmp_path: Path, case: tuple[str, str, list[tuple[float, bytes]]]
) -> None:
    check_damage(small_files, tmp_path, case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FUZZ, max_examples=20_000)
@given(damage())
def test_only_our_errors_leave_a_reader_at_length(
    small_files: dict[str, bytes], tmp_path: Path, case: tuple[str, str, list[tuple[float, bytes]]]
) -> None:
    check_damage(small_files, tmp_path, case)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(FUZZ, max_examples=200)
@given(st.sampled_from(sorted(sae_files.gemma_scope_2_config(2, 8))), JSON)
def test_any_value_in_a_config(tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / "layer_2"
    sae_files.write_gemma_scope_2(folder, SMALL, {**sae_files.gemma_scope_2_config(2, 8), key: value})
    use(folder)


@settings(FUZZ, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_as_a_label(name: str) -> None:
    with contextlib.suppress(RequestError):
        read_info(name, None)


# ── what is read, and what it costs ──────────────────────────────────────────────────────────────────────────────


def test_one_feature_reads_its_own_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sae_files.write_sparse_gemma_scope_2(tmp_path / "layer_31_width_65k_l0_medium", 384, 65536)
    sizes: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], position: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return preadv(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", counted)
    load_feature(f"{folder}#2511")
    # one four-byte read a row of w_enc, one row of w_dec, two numbers
    assert sorted(sizes) == [4] * (384 + 2) + [4 * 384]


MEMORY = """
import resource, sys
from sae_bias.saes.load import load_feature
load_feature(sys.argv[1] + "#1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
feature = load_feature(sys.argv[2] + "#2511")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert feature.d_model == 3840 and "sae_lens" not in sys.modules
print(after - before)
"""


def test_one_feature_of_a_wide_sae_costs_little_memory(tmp_path: Path) -> None:
    small = sae_files.write_sparse_gemma_scope_2(tmp_path / "small" / "layer_31_width_1k", 8, 1024)
    wide = sae_files.write_sparse_gemma_scope_2(
        tmp_path / "wide" / "layer_31_width_65k_l0_medium", 3840, 65536
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(small), str(wide)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < 60 * 1024, f"{done.stdout} KB"


def test_stored_members_of_an_npz_are_not_copied(tmp_path: Path) -> None:
    encoder = read_encoder_file(write(tmp_path, "npz") / "params.npz")
    assert all(slot.member is None for slot in encoder.file.slots.values())
    encoder = read_encoder_file(write(tmp_path, "npz compressed") / "params.npz")
    assert all(slot.member is not None for slot in encoder.file.slots.values())
