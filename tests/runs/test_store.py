"""The run folder: atomic parts, one writer, plain values, shards, and errors that say what to do."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sae_bias as sb
from sae_bias.core.files import digest, file_digest, plain
from sae_bias.runs.folder import RunFolder, merge_shards

FRAME = pd.DataFrame({"template": ["a", "b"], "bias": [1.0, float("nan")]})


def test_a_cell_comes_back_with_its_facts(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.writing():
        folder.write_cell("c1", FRAME, {"rule": "ablate", "beta": float("nan"), "bank": [0.1, 1 / 3]})
    back = folder.read_cell("c1")
    pd.testing.assert_frame_equal(back, FRAME)
    assert back.attrs == {"rule": "ablate", "beta": None, "bank": [0.1, 1 / 3]}
    assert folder.has_cell("c1")
    assert not folder.has_cell("c2")


def test_json_has_no_nan(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json(
        "summary", {"a": float("nan"), "b": np.float32(1.5), "c": (1, float("inf")), "d": Path("x")}
    )
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"a": None, "b": 1.5, "c": [1, None], "d": "x"}
    assert folder.read_json("summary")["b"] == 1.5


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "expected an object"), ("{", "cannot be read"), (None, "not a run folder")],
)
def test_unreadable_json_is_one_plain_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(sb.SaeBiasError, match=message):
        RunFolder(tmp_path).read_json("summary")


def test_a_damaged_part_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_table("sweep", FRAME)
    (tmp_path / "tables" / "sweep.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(sb.SaeBiasError, match=r"sweep\.parquet cannot be read"):
        folder.read_table("sweep")
    with pytest.raises(sb.SaeBiasError, match="holds no table 'words'"):
        folder.read_table("words")


# --- one writer ---


def _hold(path: str, ready, release) -> None:
    with RunFolder(path).writing():
        ready.set()
        release.wait(30)


def test_a_second_process_is_told_and_nothing_is_touched(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, release))
    holder.start()
    try:
        assert ready.wait(30)
        partial = tmp_path / "cells" / "x.parquet.1.partial"
        partial.parent.mkdir()
        partial.write_text("being written")
        with (
            pytest.raises(sb.SaeBiasError, match="another process is writing"),
            RunFolder(tmp_path).writing(),
        ):
            pass
        assert partial.read_text() == "being written"
    finally:
        release.set()
        holder.join(30)
    with RunFolder(tmp_path).writing():
        assert not partial.exists()


def test_the_lock_dies_with_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, release))
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid, 9)
    holder.join(30)
    deadline = time.time() + 5
    while True:
        try:
            with RunFolder(tmp_path).writing():
                return
        except sb.SaeBiasError:
            assert time.time() < deadline


def test_a_shards_files_are_left_alone_by_the_run_and_the_other_shards(tmp_path):
    """Each shard has a lock of its own; the run's own writer clears nobody else's partial files."""
    one, two = RunFolder(tmp_path, shard=(1, 2)), RunFolder(tmp_path, shard=(2, 2))
    with one.writing(), two.writing():
        partial = one.path / "cells" / "x.parquet.1.partial"
        partial.parent.mkdir(parents=True)
        partial.write_text("being written")
        with RunFolder(tmp_path).writing():
            assert partial.exists()


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_impossible_shards_are_refused(tmp_path, shard):
    with pytest.raises(sb.SaeBiasError, match="expected i/n"):
        RunFolder(tmp_path, shard=shard)


def test_merging_moves_each_cell_once(tmp_path):
    for i in (1, 2):
        with RunFolder(tmp_path, shard=(i, 2)).writing() as shard:
            shard.write_cell("base", FRAME, {})
            shard.write_cell(f"own{i}", FRAME, {})
    assert merge_shards(tmp_path) == 3
    assert merge_shards(tmp_path) == 0
    assert sorted(p.stem for p in (tmp_path / "cells").iterdir()) == ["base", "own1", "own2"]
    with pytest.raises(sb.SaeBiasError, match="no shards"):
        merge_shards(tmp_path / "cells")


# --- disk ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_and_leaves_no_half_file(tmp_path, monkeypatch, code):
    folder = RunFolder(tmp_path)
    folder.write_cell("kept", FRAME, {})

    def full(self, to, **options):
        Path(to).write_bytes(b"PAR1half")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(sb.MissingError, match=r"no space left .* what is finished is kept"):
            folder.write_cell("lost", FRAME, {})
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["kept.parquet"]
    folder.write_cell("lost", FRAME, {})
    assert folder.has_cell("lost")


def test_a_folder_that_cannot_be_made_is_one_plain_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sb.SaeBiasError, match="cannot write"), RunFolder(tmp_path / "file" / "run").writing():
        pass


# --- digests ---


def test_digests_tell_values_apart():
    assert digest(1, "a") == digest(1, "a")
    assert (
        len({digest(v) for v in (1, 1.5, "1", None, [1], {"a": 1}, {"a": 2}, float("nan"), 0.1 + 0.2, 0.3)})
        == 9
    )
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_large_files_digest_reads_its_ends(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 3_000_000)
    whole, ends = file_digest(path), file_digest(path, whole_below=1000)
    assert ends.startswith("partial:")
    path.write_bytes(b"a" * 2_999_999 + b"b")
    assert file_digest(path) != whole
    assert file_digest(path, whole_below=1000) != ends


def test_plain_values():
    assert plain({1: np.int64(2), "x": np.array(0.5), "y": {3}}) == {"1": 2, "x": 0.5, "y": [3]}
