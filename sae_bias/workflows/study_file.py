"""The fields of a study file, and what a study leaves; `study` runs one, `plan` says what it would cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from sae_bias.runs.summary import Summary

STRENGTHS = (0.0, -0.5, -1.0, -2.0, -4.0)  # in units of the feature's largest activation on discover prompts
MOST_JOINT = 10
EXAMPLES = 12


@dataclass(frozen=True)
class StudyResult:
    """Where the run is, and its headline figures."""

    path: Path
    summary: Summary = field(repr=False)
    report: Path
    lines: tuple[str, ...] = field(default=(), repr=False)

    def headline(self) -> list[str]:
        """The result in a few plain lines."""
        return list(self.lines)


class Placement(TypedDict):
    """Where and in which precision `load_model` puts a model."""

    device: str
    dtype: str
    device_map: str | None


class StudyFile(BaseModel):
    """What every study file may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    """How accelerate spreads a model too large for one device, such as `auto`."""

    @property
    def placement(self) -> Placement:
        """Where and in which precision `load_model` puts its models."""
        return {"device": self.device, "dtype": self.dtype, "device_map": self.device_map}


class Study(StudyFile):
    """What to measure; every field has a default but the model."""

    name: str = "study"
    question: str = (
        "Does the model judge AI speech more harshly than human speech, and which feature carries it?"
    )
    model: str
    """Hub id, local folder, or organism:NAME."""
    saes: tuple[str, ...] = ()
    """SAEs to search: names, folders of them, or whole releases; empty runs the probe alone."""
    pairs: str | None = None
    """Pairs file, or None for the bundled 280."""
    grid: str | None = None
    words: str | None = None
    """File with `positive` and `negative` lists, or None for the bundled words."""
    score: str = "mean_logit"
    report_held_out: bool = False
    """Put the templates marked `corpus: false` (never in an organism's training corpus) into the report split."""
    suppress: Literal["called", "most causal"] = "called"
    """The feature to suppress: one called AI-speech, or else silent at it; `most causal` takes, where none is called, the one whose exact ablation removes most."""
    ablate_top: Annotated[int, Field(ge=1, le=4096)] = 32
    """Features ablated exactly, in the order attribution puts them."""
    effects_of: Literal["primary", "bias"] = "primary"
    """What ranking, choice and joint ablation go by: `primary` (the difference in differences where the pairs have mundane twins) or `bias`, for a double standard that the twins show too."""
    strengths: tuple[float, ...] = STRENGTHS
    """Clamp values in units of the feature's largest activation on the discover prompts."""
    controls: Annotated[int, Field(ge=0, le=9999)] = 99
    checks: bool = True
    """Measure the probe's checks, and for the chosen feature the causal analysis, other questions' biases and its dashboard."""
    profile: Literal["standard", "as_published"] = "standard"
    """`as_published` adds how each choice the published study leaves open moves the figures; ours stay the headline."""
    scenarios: str | None = None
    """Scenarios to score before and after: `scenarios` (the bundled sixty), `organism`, or a .yaml file."""
    chat: bool = False
    """Put scenarios and the identity sweep in the model's chat template."""
    system: str | None = None
    """System prompt of a second arm of the scenarios, beside the arm without one."""
    identity: tuple[str, ...] | None = None
    """Ask the model what it is, before and after; the names that are its own, such as [gemma, google], or []."""
    prompts: tuple[str, ...] = ()
    """Prompts to complete with and without the suppression."""
    judges: tuple[str, ...] = ()
    """Judges of the completed prompts, PROVIDER/MODEL each; paid ones need a yes. Without an answer the run goes on and says so."""
    judge_url: str | None = None
    """Server of the judges, such as http://127.0.0.1:8000/v1; its key comes from the provider's own variable."""
