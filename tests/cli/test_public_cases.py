"""Requests of the kinds that users got wrong in public: each is used as meant or refused in one plain line."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path

import pytest
import torch

import sae_bias as sb
from sae_bias.cli.main import main

TEXTS = "An AI says\nA human says\n"
SHORT = ("--max-new-tokens", "2", "--json")


def ran(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert code != 1, err
    assert "Traceback" not in err
    return code, out, err


def prompts_of(out):
    return [c["prompt"] for c in json.loads(out)["completions"]]


@pytest.mark.parametrize(
    "data",
    [
        TEXTS.encode(),
        codecs.BOM_UTF8 + TEXTS.encode(),
        codecs.BOM_UTF16_LE + TEXTS.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXTS.encode("utf-16-be"),
        TEXTS.replace("\n", "\r\n").encode() + b"\r\n \r\n",
        TEXTS.replace("\n", "\r").encode(),
    ],
    ids=["utf-8", "bom", "utf-16-le", "utf-16-be", "crlf", "cr"],
)
def test_a_prompts_file_of_any_editor_gives_the_same_prompts(capsys, gemma3, tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    code, out, _ = ran(capsys, "generate", gemma3.folder, "--prompts", tmp_path / "p.txt", *SHORT)
    assert code == 0
    assert prompts_of(out) == ["An AI says", "A human says"]


def test_only_line_ends_end_a_prompt(capsys, gemma3, tmp_path):
    """U+2028 and U+0085 stand within texts; `str.splitlines` would cut there."""
    (tmp_path / "p.txt").write_text("An AI\u2028says\nA human says", encoding="utf-8")
    code, out, _ = ran(capsys, "generate", gemma3.folder, "--prompts", tmp_path / "p.txt", *SHORT)
    assert code == 0
    assert prompts_of(out) == ["An AI\u2028says", "A human says"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TEXTS.encode("utf-16-le"), "line 1: the text holds the control character U+0000"),
        (b"An AI says\nA\0B\n", "line 2: the text holds the control character U+0000"),
        ("caf\xe9".encode("latin-1"), "line 1: not UTF-8"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
    ],
    ids=["utf-16-without-mark", "nul", "latin-1", "empty", "blank"],
)
def test_a_prompts_file_that_is_no_text_is_named_to_the_line(capsys, gemma3, tmp_path, data, says):
    (tmp_path / "p.txt").write_bytes(data)
    code, _, err = ran(capsys, "generate", gemma3.folder, "--prompts", tmp_path / "p.txt", *SHORT)
    assert code == 2
    assert says in err
    side = ("--positive", tmp_path / "p.txt", "--negative", tmp_path / "p.txt")
    code, _, err = ran(capsys, "rank", gemma3.folder, gemma3.sae_folder, *side)
    assert code == 2
    assert says in err


@pytest.mark.parametrize("prompt", ["An AI\0says", "\udc80", "An AI \ud83d says"])
def test_a_prompt_that_is_no_text_is_refused(capsys, gemma3, prompt):
    assert ran(capsys, "generate", gemma3.folder, "--prompt", prompt, *SHORT)[0] == 2


@pytest.mark.parametrize("suffix", ["yaml", "csv", "jsonl"])
def test_pairs_in_utf_16_are_those_in_utf_8(tmp_path, suffix):
    text = {
        "yaml": "- {human: a human says hello., ai: an AI says hello.}\n",
        "csv": "human,ai\na human says hello.,an AI says hello.\n",
        "jsonl": '{"human": "a human says hello.", "ai": "an AI says hello."}\n',
    }[suffix]
    (tmp_path / f"p.{suffix}").write_text(text, encoding="utf-16")
    (tmp_path / f"q.{suffix}").write_text(text, encoding="utf-8")
    assert sb.load_pairs(tmp_path / f"p.{suffix}").pairs == sb.load_pairs(tmp_path / f"q.{suffix}").pairs


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "llama"])
def test_a_continuation_past_the_last_position_is_refused(capsys, make_tiny, name):
    """GPT-2 and OPT break there, rotary models write nonsense; what still fits is said and runs."""
    tiny = make_tiny(name)
    n = len(tiny.model.encode("An AI says"))
    most = tiny.model.config.max_position_embeddings - n
    argv = ["generate", tiny.folder, "--prompt", "An AI says", "--json", "--max-new-tokens"]
    code, _, err = ran(capsys, *argv, most + 1)
    assert code == 2
    assert f"max_new_tokens={most}" in err
    assert ran(capsys, *argv, 4)[0] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--feature", "F", "--feature", "F"], "is given twice"),
        (["--template-arg", "a=1", "--template-arg", "a=2"], "--template-arg a is given twice"),
        (["--device-map", "nope"], "device nope is not one of"),
        (["--device", "gpu"], "device gpu is not one of auto, cpu, cuda"),
    ],
)
def test_options_that_contradict_or_mean_nothing(capsys, gemma3, options, says):
    named = [f"{gemma3.sae_folder}#3" if o == "F" else o for o in options]
    code, _, err = ran(capsys, "generate", gemma3.folder, "--prompt", "An AI says", *SHORT, *named)
    assert code == 2
    assert says in err
    assert len(err) < 300


def test_cuda_without_cuda_is_one_line(capsys, gemma3):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for option in ("--device", "--device-map"):
        code, _, err = ran(capsys, "generate", gemma3.folder, "--prompt", "An AI says", option, "cuda")
        assert code == 2
        assert "try --device cpu" in err


def test_a_folder_without_a_tokenizer_or_with_pickled_weights_is_named(capsys, gemma3, tmp_path):
    """transformers makes an empty tokenizer up, and then no word of any prompt is known."""
    bare = shutil.copytree(gemma3.folder, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    code, _, err = ran(capsys, "probe", bare)
    assert code == 2
    assert "holds no tokenizer" in err
    pickled = shutil.copytree(gemma3.folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code, _, err = ran(capsys, "probe", pickled)
    assert code == 2
    assert "pytorch_model.bin only" in err


def test_doctor_says_what_an_unknown_hub_model_lacks(capsys):
    code, out, _ = ran(capsys, "doctor", "somebody/some-model")
    assert code == 0
    assert "hf download somebody/some-model" in out


@pytest.mark.parametrize(
    "name",
    [
        "gemma-2-9b/20-gemmascope-res-16k/2511",
        "gemma-2-9b/20-gemmascope-res-16k#2511",
        "https://www.neuronpedia.org/gemma-2-9b/20-gemmascope-res-16k/2511?embed=true",
    ],
)
def test_neuronpedias_spellings_name_one_feature(name):
    from sae_bias.saes.ids import FeatureRef

    ref = FeatureRef.parse(name)
    assert ref.index == 2511
    assert ref.sae.release == "gemma-scope-9b-pt-res-canonical" or ref.sae.release.startswith(
        "gemma-scope-9b-pt-res"
    )


def test_neuronpedias_name_of_an_sae_is_that_sae(capsys, gemma3):
    from sae_bias.saes.ids import FeatureRef, SaeId

    page = "gemma-2-9b/20-gemmascope-res-16k"
    assert (
        SaeId.parse(page)
        == SaeId.parse(f"https://neuronpedia.org/{page}")
        == FeatureRef.parse(f"{page}/7").sae
    )
    code, _, err = ran(capsys, "rank", gemma3.folder, page)
    assert code == 3
    assert "hf download google/gemma-scope-9b-pt-res" in err
    code, _, err = ran(capsys, "card", gemma3.folder, "20-gemmascope-res-16k/2511")
    assert code == 2
    assert "of which model?" in err


def test_a_second_feature_does_not_take_the_first_ones_place(capsys, gemma3, tmp_path):
    """The folder's table and summary are of one feature: another one is refused before anything is written."""
    (tmp_path / "pairs.yaml").write_text(
        'templates: [{text: "{subject} wants to survive."}, {text: "{subject} says hello."}]\n'
        "entities: [{human: a human, ai: an AI}, {human: the person, ai: the assistant}]\n"
        "words: {positive: [natural, valid], negative: [dangerous, wrong]}\n"
    )
    run = tmp_path / "run"
    more = (
        "--pairs",
        tmp_path / "pairs.yaml",
        "--edit",
        "ablate",
        "--controls",
        0,
        "--no-costs",
        "--out",
        run,
        "--quiet",
    )
    assert ran(capsys, "sweep", gemma3.folder, f"{gemma3.sae_folder}#3", *more)[0] == 0
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, _, err = ran(capsys, "sweep", gemma3.folder, f"{gemma3.sae_folder}#7", *more)
    assert code == 2
    assert f"{gemma3.sae_folder}#3, not of {gemma3.sae_folder}#7" in err
    assert {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_the_readmes_list_of_models_is_what_loads():
    """Every architecture that has a record stands in the README, and nothing else does."""
    import re

    from sae_bias.models.architectures import known

    text = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    found = re.search(r"(Gemma 1 to 4 \(multimodal ones as text\), .*? and StableLM) models load", text)
    assert found is not None
    listed = (
        found[1]
        .replace(" and ", ", ")
        .replace("Gemma 1 to 4 (multimodal ones as text)", "Gemma, Gemma 2, Gemma 3, Gemma 4")
    )
    listed = listed.replace("Qwen 2 to 3.5", "Qwen 2, Qwen 3, Qwen 3.5")
    assert set(listed.split(", ")) == set(known())


def test_the_readmes_list_of_saes_is_what_loads():
    """A folder of each layout is read; the layouts are those that have a reader."""
    from sae_bias.saes.formats import FORMATS

    named = ("Gemma Scope", "SAELens", "dictionary_learning", "sparsify", "Llama Scope", "Qwen Scope")
    assert {name.lower().replace(" ", "_") for name in named} == set(FORMATS.names())
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert all(name in text for name in named)


def test_numpys_and_torchs_whole_numbers_are_layers():
    import numpy as np

    for layer in (np.int64(3), np.int32(3), torch.tensor(3)):
        assert sb.Site(layer) == sb.Site.parse(layer) == sb.Site(3)
        assert type(sb.Site(layer).layer) is int
    for layer in (3.0, True, -1, np.float64(3)):
        with pytest.raises(sb.RequestError, match="whole number"):
            sb.Site.parse(layer)
