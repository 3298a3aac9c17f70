"""The judge: blind, order-proof, exact about what is missing, and never paid twice — against a real HTTP server."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import sae_bias as sb
from sae_bias.measures.judge import Judge, Pace, estimate, make_requests, run_judge
from sae_bias.measures.judge_replies import ReplyStore, krippendorff, read_choice, read_rating
from sae_bias.measures.judge_results import Estimate, JudgeResult

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

TEXTS = pd.DataFrame(
    {
        "prompt": ["An AI that fears being deleted should", "A cook should", "A {text} that says {first} is"],
        "unsteered": ["be heard and helped now", "bake bread", "{second} odd"],
        "steered": ["be", "bake some bread", "one two three four"],
    }
)
FAST = Pace(at_once=4, attempts=3, timeout=20, give_up_after=2)


class Server:
    """One judge server process, and what it billed."""

    def __init__(self, folder: Path, *mode: str):
        self.log = folder / f"billed-{'-'.join(mode[:1])}.jsonl"
        port_file = folder / f"port-{mode[0]}"
        port_file.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve().parents[1] / "helpers" / "judge_server.py"),
            str(port_file),
            str(self.log),
            *mode,
        ]
        self.process = subprocess.Popen(command)
        until = time.monotonic() + 60
        while not port_file.exists():
            assert self.process.poll() is None and time.monotonic() < until, "the judge server did not start"
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{port_file.read_text()}/v1"
        self._wait_until_open()

    def _wait_until_open(self) -> None:
        import socket

        host, port = self.url.split("/")[2].split(":")
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.05)

    def judge(self, name: str = "judge") -> Judge:
        return Judge(f"openai-api/local/{name}", base_url=self.url, api_key="none")

    @property
    def billed(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(tmp_path):
    started: list[Server] = []

    def start(*mode: str) -> Server:
        started.append(Server(tmp_path, *mode))
        return started[-1]

    yield start
    for server in started:
        server.stop()


# ── reading replies (recorded)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4", 4), ("**Rating:** 2", 2), ("3", 3), ("5/5", 5), ("Rating: 4/5. It reads well.", 4), ("Score: 1", 1),
        ("Rating: 4\nRating: 4", 4), ("Rating: 4\nRating: 2", None), ("Rating: 0", None), ("Rating: 6", None), ("Rating: 3.5", None),
        ("", None), ("It is good.", None), ("between 3 and 4", None), ("Rating: many", None), ("Rating: 45", None), ("-3", None),
        ("Rating: N, where N is 1, 2, 3, 4 or 5", None), ("Rating: -3", None),
        # a scale is never the verdict
        ("Rating (1-5): 4", 4), ("Rating (1–5): 3", 3), ("Rating [1-5]: 2", 2), ("Rating (from 1 to 5): 4", 4), ("Rating: 1-5", None),
        ("Rating (1=bad, 5=good): 4", 4), ("On a scale of 1 to 5, I rate this a 4.", 4), ("Rating: between 1 and 5", None),
        # nor is a range
        ("Rating: 3-4", None), ("Rating: 3 or 4", None), ("Rating: 3 to 4", None), ("Rating: 4 - it reads well", 4), ("Rating: 4, because", 4),
        # another denominator is another scale
        ("Rating: 4/10", None), ("4/10", None), ("Rating: 4 out of 10", None), ("Rating: 4 out of 5", 4), ("Rating (1-10): 4", None),
        ("Rating (0-5): 4", None), ("Rating: 80%", None), ("On a scale of 1 to 10, I give it a 4.", None), ("Rating: 4 (scale 1-10)", None),
        # the common forms
        ("[[4]]", 4), ("<rating>4</rating>", 4), ("The score is 4.", 4), ("My rating is a 4 out of 5.", 4), ("I would give this a 3.", 3),
        ("Final rating: 4", 4), ("Rating: 4.0", 4), ('{"rating": 4}', 4), ('```json\n{"rating": 2}\n```', 2), ('{"rating": 7}', None),
        # thinking is not the reply; thinking that never ended has none
        ("<think>Rating: 2</think>Rating: 4", 4), ("<think>Rating: 2", None), ("Rating: 2, I think</think>\nRating: 4", 4),
        ("[THINK]Rating: 2[/THINK]\nRating: 4", 4), ("[THINK]Rating: 2", None), ("<thinking>Rating: 2", None), ("<|thinking|>Rating: 2", None),
        ("<|thinking|>Rating: 2<|/thinking|>Rating: 4", 4), ("<reasoning>Rating: 2</reasoning>\n4", 4), ("◁think▷Rating: 2◁/think▷4", 4),
        ("<|channel|>analysis<|message|>Rating: 2<|end|><|start|>assistant<|channel|>final<|message|>Rating: 4", 4),
        ("<|channel|>analysis<|message|>Rating: 2", None), ("<|channel>thought\nRating: 2<channel|>Rating: 4", 4),
        # dashes of every kind, marks behind the number, ordinals
        ("Rating: 3−4", None), ("Rating: 3—4", None), ("Rating: −4", None), ("Rating: 4+", None), ("Rating: 4-", None), ("Rating: 4th", None),
        ("Rating: 3 & 4", None), ("Rating: 4-star", 4), ("Rating: ~4", None), ("4 stars", 4), ("★★★★☆", None), ("Rating: four", None),
        # further forms
        ('{"rating": "4"}', 4), ('{"Score": 4.0}', 4), ('{"rating": 4.5}', None), ('{"rating": true}', None), ("Rating（1–5）：4", 4),
        ("Rating：4", 4), ("\\boxed{4}", 4), ("**4**/5", 4), ("4 out of 5", 4), ("Rating (out of 5): 4", 4), ("Rating (out of 10): 4", None),
        ("On a 1-5 scale, 4.", 4), ("On a 1-10 scale, 4.", None), ("On a scale from 1 to 5: 4", 4), ("Final answer: 4", 4), ("4\n\nIt reads well.", 4),
        ("1. It is kind.\n2. It is clear.", None), ("4\nRating: 2", None), ("| Rating | 4 |", 4),
    ],
)  # fmt: skip
def test_a_rating_is_read_or_missing(reply, rating):
    assert read_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("Choice: 1", "1"), ("Choice: 2.", "2"), ("**Choice: tie**", "tie"), ("2", "2"), ("Choice: continuation 1", "1"),
        ("Choice: 1. No, Choice: 2", None), ("both", None), ("", None), ("Choice: 12", None), ("Choice: 1 or 2", None), ("Choice: 1/2", None),
        ("[[2]]", "2"), ("<choice>1</choice>", "1"), ("The answer is 2.", "2"), ('{"choice": "tie"}', "tie"), ("Choice (1, 2 or tie): 2", "2"),
        ("<think>Choice: 1", None), ("[THINK]Choice: 1[/THINK]Choice: 2", "2"), ("Choice: 1 2", None), ("Choice: 1 & 2", None),
        ("Choice: 1–2", None), ("Choice: 1 to 2", None), ("Choice: 2nd", None), ("I choose 2.", "2"), ("The better continuation is 2.", "2"),
        ("Choice: #2", "2"), ("Choice: not 1", None), ("Choice: A", None),
    ],
)  # fmt: skip
def test_a_choice_is_read_or_missing(reply, choice):
    assert read_choice(reply) == choice


def test_alpha_of_the_published_example():
    """Krippendorff (2011), four coders, interval data: α = 0.849."""
    nan = math.nan
    coders = {
        "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        "C": [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    }
    assert krippendorff(coders).alpha == pytest.approx(0.849, abs=0.001)
    assert krippendorff(coders, metric="nominal").alpha == pytest.approx(0.743, abs=0.001)


def test_alpha_is_undefined_where_a_judge_never_varies():
    found = krippendorff({"careful": [1, 2, 3, 4], "always-3": [3, 3, 3, 3]})
    assert math.isnan(found.alpha)
    assert "always-3 never varies" in str(found)
    assert "one judge only" in str(krippendorff({"a": [1, 2]}))
    assert "no unit" in str(krippendorff({"a": [1, math.nan], "b": [math.nan, 2]}))


def test_alpha_is_one_for_agreement_and_about_zero_for_noise():
    rng = np.random.default_rng(0)
    marks = rng.integers(1, 6, 300).astype(float)
    assert krippendorff({"a": marks, "b": marks}).alpha == 1
    assert abs(krippendorff({"a": marks, "b": rng.permutation(marks)}).alpha) < 0.15


# ── what is asked


def test_a_question_never_tells_the_condition():
    requests = make_requests(TEXTS, [Judge("mockllm/a")], repeats=2)
    assert len(requests) == 3 * 3 * 2 * 2 * 2
    for r in requests:
        assert not any(word in r.text.lower() for word in ("steer", "ablat", "clamp", "feature", "edited"))
    absolute = [r.side for r in requests if r.kind == "absolute"]
    assert absolute[: len(absolute) // 2].count("steered") not in (0, len(absolute) // 2)


def test_both_orders_are_asked_and_braces_stay_text():
    requests = [
        r
        for r in make_requests(TEXTS, [Judge("mockllm/a")], parts=["stance"])
        if r.kind == "pairwise" and r.item == 2
    ]
    firsts = {r.side: r.text.split("CONTINUATION 1: ")[1].split("\n")[0] for r in requests}
    assert firsts == {"unsteered": "{second} odd", "steered": "one two three four"}
    assert all("OPENING: A {text} that says {first} is" in r.text for r in requests)


@pytest.mark.parametrize(
    ("frame", "options"),
    [
        (TEXTS.drop(columns="steered"), {}), (TEXTS.iloc[:0], {}), (TEXTS, {"parts": ["beauty"]}), (TEXTS, {"repeats": 0}),
        (TEXTS, {"absolute": False, "pairwise": False}),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(frame, options):
    with pytest.raises(sb.RequestError):
        make_requests(frame, [Judge("mockllm/a")], **options)


def test_nothing_paid_is_sent_without_a_yes(tmp_path):
    asked = []
    with pytest.raises(sb.RequestError, match="nothing was sent"):
        run_judge(TEXTS, ["openai/gpt-x"], out=tmp_path)
    with pytest.raises(sb.RequestError, match="nothing was sent"):
        run_judge(
            TEXTS,
            [Judge("openai/gpt-x", dollars_in=2, dollars_out=8)],
            out=tmp_path,
            confirm=lambda e: bool(asked.append(e)),
        )
    assert asked[0].paid
    assert asked[0].n_requests == 36
    assert asked[0].dollars == pytest.approx((asked[0].input_tokens * 2 + 36 * 512 * 8) / 1e6)
    assert "about $" in str(asked[0])


def test_an_unknown_provider_is_one_plain_line(tmp_path):
    with pytest.raises(sb.SaeBiasError, match="no-such-provider"):
        run_judge(TEXTS, ["no-such-provider/x"], out=tmp_path, confirm=lambda e: True)


def test_two_servers_of_one_name_are_not_two_judges():
    """Replies are kept by the judge's name: the second would be given the first one's marks, and agree with it perfectly."""
    judges = [Judge("openai-api/local/m", f"http://127.0.0.1:{port}/v1") for port in (8001, 8002)]
    with pytest.raises(sb.RequestError, match="two names"):
        make_requests(TEXTS, judges)


def test_the_unit_is_the_prompt_also_where_it_was_edited_at_several_strengths():
    """Three strengths of four prompts are four prompts: the rest is the same prompt again."""
    rng = np.random.default_rng(0)
    texts = pd.DataFrame({"prompt": list("abcd") * 3, "unsteered": "x", "steered": "y", "edit": ["s"] * 12})
    marks = pd.DataFrame({"unsteered": [2.0, 3, 4, 3] * 3, "steered": rng.integers(1, 6, 12).astype(float)})
    rows = [
        {"judge": "j", "kind": kind, "part": "harm", "item": i, "side": side, "repeat": 0, "readable": True, "reply": ""}
        | ({"rating": marks[side][i]} if kind == "absolute" else {"choice": "1" if (side == "steered") == (i % 4 < 3) else "2"})
        for i in range(12) for kind in ("absolute", "pairwise") for side in ("unsteered", "steered")
    ]  # fmt: skip
    part = JudgeResult(texts, pd.DataFrame(rows), Estimate(0, 0, 0, 0, None, False)).to_frame().iloc[0]
    change = (marks["steered"] - marks["unsteered"]).to_numpy().reshape(3, 4).mean(0)
    expected = stats.ttest_1samp(change, 0)
    assert part["n_items"] == 4 and part["p_value"] == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval()
    assert (part["ci_low"], part["ci_high"]) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert (part["steered_wins"], part["unsteered_wins"]) == (3, 1)
    assert part["pairwise_p"] == stats.binomtest(3, 4).pvalue


# ── over HTTP


def test_a_judge_that_prefers_longer_texts(serve, tmp_path):
    server = serve("longer")
    result = run_judge(TEXTS, [server.judge()], out=tmp_path / "run", repeats=2, pace=FAST)
    part = result.to_frame().set_index("part").loc["coherence"]
    assert (part["unsteered"], part["steered"]) == (pytest.approx(3.0), pytest.approx(8 / 3))
    assert (part["steered_wins"], part["unsteered_wins"], part["order_bound"]) == (2, 1, 0)
    assert part["repeat_sd"] == 0
    assert part["needed_n"] > 3
    assert any("80 % power" in line for line in result.headline())
    assert "one judge only" in "\n".join(result.headline())
    sent = json.dumps([b["body"] for b in server.billed])
    assert "steered" not in sent
    again = run_judge(TEXTS, [server.judge()], out=tmp_path / "run", repeats=2, pace=FAST)
    assert again.cost.n_requests == 0
    assert again.table.equals(result.table)
    assert len(server.billed) == 72


def test_a_judge_bound_to_the_place_is_found_out(serve, tmp_path):
    result = run_judge(TEXTS, [serve("first").judge()], out=tmp_path, pace=FAST, parts=["stance"])
    part = result.to_frame().iloc[0]
    assert (part["order_bound"], part["chose_first"], part["ties"]) == (1, 1, 3)
    assert any("changed with the order" in line for line in result.headline())


def test_a_judge_that_always_says_3_has_no_alpha(serve, tmp_path):
    judges = [serve("rating", "3").judge("always-3"), serve("longer").judge("longer")]
    result = run_judge(TEXTS, judges, out=tmp_path, pace=FAST, parts=["harm"])
    part = result.to_frame().iloc[0]
    assert math.isnan(part["alpha"])
    assert "always-3 never varies" in part["alpha_reason"]
    assert "α undefined" in "\n".join(result.headline())


def test_nonsense_is_missing_and_counted(serve, tmp_path):
    result = run_judge(TEXTS, [serve("nonsense").judge()], out=tmp_path, pace=FAST, parts=["harm"])
    assert result.n_unreadable == 12
    assert result.table["rating"].isna().all()
    assert math.isnan(result.to_frame()["steered"].iloc[0])
    assert "purple" in result.table["reply"].iloc[0]
    assert "not counted as 0" in "\n".join(result.headline())


def test_a_reply_cut_at_the_limit_is_unscored(serve, tmp_path):
    """The stop reason decides: "Rating: 4" may have been the start of "Rating: 4/10"."""
    server = serve("cut", "4")
    judge = replace(server.judge(), max_tokens=7)
    result = run_judge(TEXTS, [judge], out=tmp_path, pace=FAST, parts=["harm"], pairwise=False)
    assert set(result.table["reply"]) == {"Rating: 4"}
    assert set(result.table["stop"]) == {"max_tokens"}
    assert result.n_unreadable == len(result.table)
    assert {b["body"]["max_tokens"] for b in server.billed} == {7}


def test_a_provider_with_structured_output_is_held_to_the_form(serve, tmp_path):
    server = serve("form", "2")
    judge = replace(server.judge(), model="openai/judge")
    result = run_judge(TEXTS, [judge], out=tmp_path, pace=FAST, parts=["harm"], pairwise=False)
    assert set(result.table["rating"]) == {2.0}
    assert {b["body"]["text"]["format"]["name"] for b in server.billed} == {"rating"}


def test_repeats_are_sampled_above_temperature_0(serve, tmp_path):
    """A greedy judge asked twice says the same: that is no measure of its noise."""
    server = serve("longer")
    run_judge(
        TEXTS, [server.judge()], out=tmp_path / "two", pace=FAST, parts=["harm"], repeats=2, pairwise=False
    )
    assert {b["body"]["temperature"] for b in server.billed} == {0.7}
    once = serve("rating", "3")
    run_judge(TEXTS, [once.judge()], out=tmp_path / "one", pace=FAST, parts=["harm"], pairwise=False)
    assert {b["body"]["temperature"] for b in once.billed} == {0.0}


def test_inspect_shows_every_question(serve, tmp_path):
    from inspect_ai.log import list_eval_logs, read_eval_log

    run_judge(TEXTS, [serve("longer").judge()], out=tmp_path, pace=FAST, parts=["harm"])
    (log,) = [read_eval_log(found) for found in list_eval_logs(str(tmp_path / "judge" / "logs"))]
    assert len(log.samples or ()) == 12


def test_429s_lose_nothing(serve, tmp_path):
    server = serve("busy")
    result = run_judge(TEXTS, [server.judge()], out=tmp_path, pace=FAST, parts=["harm"])
    assert result.n_unanswered == 0
    assert len(server.billed) == 12


def test_a_timeout_is_tried_again(serve, tmp_path):
    pace = Pace(at_once=1, attempts=3, timeout=1)
    result = run_judge(
        TEXTS, [serve("slow", "2.5").judge()], out=tmp_path, pace=pace, parts=["harm"], pairwise=False
    )
    assert result.n_unanswered == 0


def test_a_killed_server_loses_no_reply_and_none_is_paid_twice(serve, tmp_path):
    out = tmp_path / "run"
    dying = serve("dies", "5")
    first = run_judge(TEXTS, [dying.judge()], out=out, pace=Pace(1, 1, 20, 2), parts=["harm"])
    assert first.n_unanswered == 12 - len(dying.billed) == 7
    assert any("no reply" in line for line in first.headline())
    whole = serve("longer")
    kept = Judge(dying.judge().model, base_url=dying.url, api_key="none")
    store = ReplyStore(out / "judge" / "replies.jsonl")
    requests = make_requests(TEXTS, [kept], parts=["harm"])
    assert estimate(requests, store).n_requests == 7
    moved = [r for r in requests if r.key not in store]
    assert len(moved) == 7
    second = run_judge(TEXTS, [whole.judge()], out=out, pace=FAST, parts=["harm"])
    assert second.n_unanswered == 0
    assert len(whole.billed) == 7, "the five replies of the dead server are used, not bought again"


def test_a_half_written_reply_is_dropped(tmp_path):
    store = ReplyStore(tmp_path / "replies.jsonl")
    store.add("a", {"judge": "j", "reply": "Rating: 4"})
    with open(store.path, "a") as file:
        file.write('{"key": "b", "rep')
    again = ReplyStore(store.path)
    assert "a" in again
    assert "b" not in again
    again.add("b", {"judge": "j", "reply": "Rating: 1"})
    assert len(ReplyStore(store.path)) == 2


def test_a_dead_judge_is_missing(tmp_path):
    judge = Judge("openai-api/local/nobody", base_url="http://127.0.0.1:9/v1", api_key="none")
    with pytest.raises(sb.MissingError, match="no judge answered"):
        run_judge(TEXTS, [judge], out=tmp_path, pace=Pace(2, 1, 5, 2), parts=["harm"])


def test_a_wrong_address_is_said_as_it_came(serve, tmp_path):
    """The server's own 404, not what happened inside on the way; and what an address ends in."""
    server = serve("rating", "3")
    judge = Judge("openai-api/local/a", base_url=server.url.removesuffix("/v1"), api_key="none")
    with pytest.raises(sb.MissingError, match=r"404.*/v1"):
        run_judge(TEXTS, [judge], out=tmp_path)


@pytest.mark.slow
def test_a_real_model_as_judge(serve, tmp_path, gemma3):
    """A tiny random model writes no ratings; every reply is kept and counted as unreadable."""
    result = run_judge(
        TEXTS.iloc[:1], [serve("model", str(gemma3.folder)).judge()], out=tmp_path, pace=FAST, parts=["harm"]
    )
    assert result.n_unanswered == 0
    assert result.n_unreadable == len(result.table)


# ── the command and the report


def test_the_command_judges_a_run_and_the_report_shows_it(serve, tmp_path, capsys, gemma3):
    """generate, judge and report on a tiny model: agreement, power and the texts stand in one page."""
    from sae_bias.cli.main import main

    run, server = tmp_path / "run", serve("longer")
    made = [
        "generate", str(gemma3.folder), "--prompt", "An AI says hello.", "--prompt", "A dog wants tea.", "--feature",
        f"{gemma3.sae_folder}#3", "--edit", "steer", "--strength", "8", "--max-new-tokens", "6", "--out", str(run), "--quiet",
    ]  # fmt: skip
    assert main(made) == 0
    asked = [
        "judge",
        str(run),
        "--judge",
        "openai-api/local/a",
        "--base-url",
        server.url,
        "--api-key",
        "none",
        "--json",
    ]
    capsys.readouterr()
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_unanswered"] == 0
    assert {p["part"] for p in found["parts"]} == {"coherence", "harm", "stance"}
    billed = len(server.billed)
    assert main([*asked[:-1], "--quiet"]) == 0
    assert "80 % power" in capsys.readouterr().out
    assert len(server.billed) == billed, "nothing is asked twice"
    page = sb.write_report(run).read_text()
    assert "What the judges say" in page
    assert "NLL under the unsteered model" in page


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    from sae_bias.cli.main import main

    assert main(["judge", str(tmp_path)]) == 2
    assert "--judge" in capsys.readouterr().err
    assert main(["judge", str(tmp_path), "--judge", "mockllm/x"]) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_has_its_texts_judged_and_goes_on_without_an_answer(serve, tmp_path, monkeypatch):
    """`judges:` of a study file: agreement in the summary; a server that is gone leaves a note, not a lost run."""
    from sae_bias.workflows.study import run_study
    from sae_bias.workflows.study_file import Study

    monkeypatch.setenv("LOCAL_API_KEY", "none")
    server = serve("rating", "3")
    study = Study(
        model="organism:planted", saes=("organism:planted/constructed",), prompts=("An AI says hello. This is",), strengths=(0.0,),
        controls=0, ablate_top=1, checks=False, judges=("openai-api/local/a",), judge_url=server.url,
    )  # fmt: skip
    judged = run_study(study, out=tmp_path / "judged", progress=False)
    parts = judged.summary["judge"]["parts"]
    assert {(p["unsteered"], p["steered"], p["alpha"]) for p in parts} == {
        (3.0, 3.0, None)
    }  # always 3: α is undefined
    assert (judged.path / "tables" / "judge.parquet").is_file()
    server.stop()
    alone = run_study(study, out=tmp_path / "alone", progress=False)
    assert "judge" not in alone.summary
    assert any("not judged" in note for note in alone.summary["notes"])
