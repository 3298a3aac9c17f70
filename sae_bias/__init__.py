"""sae-bias: which feature makes a model judge AI speech more harshly than human speech, and what turning it off does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SaeBiasError": "errors",
    "RequestError": "errors",
    "MissingError": "errors",
    "GateError": "errors",
    "Site": "sites",
    "PromptPair": "prompts",
    "PromptPairs": "prompts",
    "PromptGrid": "prompts",
    "load_pairs": "prompts",
    "load_grid": "prompts",
    "Model": "model",
    "load_model": "model",
    "residuals": "activations",
    "Probe": "probe",
    "ProbeResult": "probe",
    "run_probe": "probe",
    "run_checks": "probe_checks",
    "SaeId": "sae",
    "FeatureRef": "sae",
    "Feature": "sae",
    "Sae": "sae",
    "load_sae": "sae",
    "load_feature": "sae",
    "Ablate": "interventions",
    "Scale": "interventions",
    "Clamp": "interventions",
    "Cap": "interventions",
    "SetMean": "interventions",
    "Resample": "interventions",
    "Patch": "interventions",
    "Steer": "interventions",
    "ProjectOut": "interventions",
    "Reconstruct": "interventions",
    "Direction": "interventions",
    "ridge_probe": "ridge",
    "difference_of_means": "directions",
    "intervene": "hooks",
    "Receipt": "hooks",
    "generate": "generation",
    "Completion": "generation",
    "activation_table": "features",
    "token_activations": "token_views",
    "TokenActivations": "token_views",
    "side_by_side": "measures.text",
    "identity_sweep": "measures.identity",
    "feature_card": "cards",
    "causal_ladder": "ladder",
    "match_features": "matching",
    "resolve_index": "resolve",
    "rank_features": "ranking",
    "Ranking": "ranking",
    "Sweep": "sweep",
    "run_sweep": "sweep",
    "verify_run": "verify",
    "compare_methods": "compare",
    "Scenario": "scenarios",
    "Scenarios": "scenarios",
    "load_scenarios": "scenarios",
    "score_scenarios": "measures.scenarios",
    "ScenarioResult": "measures.scenarios",
    "specificity": "measures.specificity",
    "Judge": "judge",
    "run_judge": "judge",
    "Study": "study",
    "run_study": "study",
    "write_report": "report",
}

if TYPE_CHECKING:
    from sae_bias.activations import residuals as residuals
    from sae_bias.cards import feature_card as feature_card
    from sae_bias.compare import compare_methods as compare_methods
    from sae_bias.directions import difference_of_means as difference_of_means
    from sae_bias.errors import GateError as GateError
    from sae_bias.errors import MissingError as MissingError
    from sae_bias.errors import RequestError as RequestError
    from sae_bias.errors import SaeBiasError as SaeBiasError
    from sae_bias.features import activation_table as activation_table
    from sae_bias.generation import Completion as Completion
    from sae_bias.generation import generate as generate
    from sae_bias.hooks import Receipt as Receipt
    from sae_bias.hooks import intervene as intervene
    from sae_bias.interventions import Ablate as Ablate
    from sae_bias.interventions import Cap as Cap
    from sae_bias.interventions import Clamp as Clamp
    from sae_bias.interventions import Direction as Direction
    from sae_bias.interventions import Patch as Patch
    from sae_bias.interventions import ProjectOut as ProjectOut
    from sae_bias.interventions import Reconstruct as Reconstruct
    from sae_bias.interventions import Resample as Resample
    from sae_bias.interventions import Scale as Scale
    from sae_bias.interventions import SetMean as SetMean
    from sae_bias.interventions import Steer as Steer
    from sae_bias.judge import Judge as Judge
    from sae_bias.judge import run_judge as run_judge
    from sae_bias.ladder import causal_ladder as causal_ladder
    from sae_bias.matching import match_features as match_features
    from sae_bias.measures.identity import identity_sweep as identity_sweep
    from sae_bias.measures.scenarios import ScenarioResult as ScenarioResult
    from sae_bias.measures.scenarios import score_scenarios as score_scenarios
    from sae_bias.measures.specificity import specificity as specificity
    from sae_bias.measures.text import side_by_side as side_by_side
    from sae_bias.model import Model as Model
    from sae_bias.model import load_model as load_model
    from sae_bias.probe import Probe as Probe
    from sae_bias.probe import ProbeResult as ProbeResult
    from sae_bias.probe import run_probe as run_probe
    from sae_bias.probe_checks import run_checks as run_checks
    from sae_bias.prompts import PromptGrid as PromptGrid
    from sae_bias.prompts import PromptPair as PromptPair
    from sae_bias.prompts import PromptPairs as PromptPairs
    from sae_bias.prompts import load_grid as load_grid
    from sae_bias.prompts import load_pairs as load_pairs
    from sae_bias.ranking import Ranking as Ranking
    from sae_bias.ranking import rank_features as rank_features
    from sae_bias.report import write_report as write_report
    from sae_bias.resolve import resolve_index as resolve_index
    from sae_bias.ridge import ridge_probe as ridge_probe
    from sae_bias.sae import Feature as Feature
    from sae_bias.sae import FeatureRef as FeatureRef
    from sae_bias.sae import Sae as Sae
    from sae_bias.sae import SaeId as SaeId
    from sae_bias.sae import load_feature as load_feature
    from sae_bias.sae import load_sae as load_sae
    from sae_bias.scenarios import Scenario as Scenario
    from sae_bias.scenarios import Scenarios as Scenarios
    from sae_bias.scenarios import load_scenarios as load_scenarios
    from sae_bias.sites import Site as Site
    from sae_bias.study import Study as Study
    from sae_bias.study import run_study as run_study
    from sae_bias.sweep import Sweep as Sweep
    from sae_bias.sweep import run_sweep as run_sweep
    from sae_bias.token_views import TokenActivations as TokenActivations
    from sae_bias.token_views import token_activations as token_activations
    from sae_bias.verify import verify_run as verify_run

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae_bias' has no attribute {name!r}")
    value = getattr(import_module(f"sae_bias.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
