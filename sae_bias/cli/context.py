"""What the commands share: their options, what a command prints, and one `Run` that opens what the options name and keeps what is found.

    @command("card", "sae-bias card MODEL FEATURE", takes=(*FEATURE, "grid"))
    def card(run: Run, texts: str | None = None) -> None:
        \"""Show what a feature means.

        Args:
            --texts FILE: Text collection.
        \"""

A command's signature and the lines under `Args:` are its options. `takes` names shared ones by their Python name; `--json`, `--out` and
`--quiet` come with every command. What a library prints goes to standard error.
"""

import contextlib
import inspect
import json as json_module
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args, get_origin

import typer

from sae_bias.core.errors import RequestError
from sae_bias.core.threads import SAY_THREADS

if TYPE_CHECKING:
    import pandas as pd

    from sae_bias.measures.fidelity import Fidelity
    from sae_bias.models.model import Model
    from sae_bias.probe.words import Probe
    from sae_bias.prompts.grid import PromptGrid
    from sae_bias.prompts.pairs import PromptPairs
    from sae_bias.saes.sae import Feature, Sae
    from sae_bias.steering.intervention import Intervention


UNDEFINED = "–"
_PIPED_WIDTH = 160


# --- options ---
def _shared(
    *, model: str, feature: str, features: list[str] | None = None, edit: str = "ablate", strength: str | None = None, unit: str = "act",
    positions: str = "all", chat: bool = False, system: str | None = None, template_arg: list[str] | None = None, grid: str | None = None,
    pairs: str | None = None, words: str | None = None, randomized_sae: bool = False, score: str = "mean_logit", seed: int = 0,
    split: Path | None = None, shard: str | None = None, device: str = "auto", device_map: str | None = None, dtype: str = "auto",
    json: bool = False, out: Path | None = None, quiet: bool = False,
) -> None:  # fmt: skip
    """What several commands take, each by its name here.

    Args:
        MODEL: Hub id, local folder, .gguf file, or organism:planted.
        FEATURE: RELEASE/SAE_ID#INDEX, or path/to/sae_folder#INDEX.
        --feature FEATURE: Feature to edit; given several times, they are edited together. None measures the unsteered model only.
        --edit: ablate, scale, clamp, cap, mean, steer, project_out, or one that a plugin brings.
        --strength NUMBER: Value of the edit; ablate has none.
        --unit: act: strengths as activations are; max: times each feature's largest activation on the bundled pairs.
        --positions: Where the edit acts: all, last, subject, prompt or generated (special tokens never).
        --chat: Put each prompt in a user turn of the model's chat template.
        --system TEXT: System prompt put before every prompt.
        --template-arg NAME=VALUE: Given to the chat template, such as enable_thinking=false; several times.
        --grid FILE: Grid file; the bundled grid by default.
        --pairs FILE: Pairs file (.yaml, .csv, .jsonl) or a bundled name (treatment, survival-2, gender …); the bundled 280 by default.
        --words FILE: YAML file with lists `positive` and `negative`; the bundled words by default.
        --randomized-sae: The same in a randomized SAE too, as a control: what it finds is the search's own yield.
        --score: mean_logit, logodds or auroc.
        --seed: Seed of every random choice.
        --split RUN: Run folder whose split of templates is used, such as the ranking's that found the feature; by default that in --out, else --seed's.
        --shard I/N: Run every N-th cell, from the I-th; join with `sae-bias merge`.
        --device: auto, cpu, cuda, cuda:1 …
        --device-map MAP: How accelerate spreads a model too large for one device, such as auto; --device is then not used.
        --dtype: auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16.
        --json: Print one JSON object, and nothing else on standard output.
        --out DIR: Folder to write to.
        --quiet, -q: Only the headline: no tables, no progress.
    """


_LINE = re.compile(r"(?:(?P<flags>--[^\s,:]+(?:, -[^\s,:]+)*) ?)?(?P<metavar>\S*?): ?(?P<help>.*)")


def parameters(function: Callable[..., None]) -> tuple[str, list[inspect.Parameter]]:
    """What typer is told of a command: its help, and each parameter with the flags, metavar and help of its line under `Args:`.

    A line that names no flag is of the next parameter that no flag names; a list may have its flag's plural as its name.
    """
    text, _, listed = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    left = {p.name: p for p in inspect.signature(function).parameters.values() if p.name != "run"}
    lines = [match for line in listed.splitlines() if (match := _LINE.fullmatch(line.strip()))]
    names = {m["flags"]: re.split("[/,]", m["flags"])[0][2:].replace("-", "_") for m in lines if m["flags"]}
    optional = {n for n, p in left.items() if p.default is not p.empty}
    names = {flags: n if n in optional else f"{n}s" for flags, n in names.items()}
    arguments = iter([n for n in left if n not in names.values()])
    found = {}
    for line in lines:
        name = names[line["flags"]] if line["flags"] else next(arguments)
        p = left.pop(name)
        told: dict[str, Any] = {"help": line["help"] or None, "metavar": line["metavar"] or None}
        kind, more = get_args(p.annotation) if get_origin(p.annotation) is Annotated else (p.annotation, {})
        told |= {"show_default": p.default not in (None, p.empty), **more}
        made = typer.Option(*line["flags"].split(", "), **told) if line["flags"] else typer.Argument(**told)
        found[name] = p.replace(annotation=Annotated[kind, made])  # pyright: ignore[reportInvalidTypeForm]
    return text, [p.replace(kind=p.KEYWORD_ONLY) for p in [*found.values(), *left.values()]]


SHARED: Mapping[str, inspect.Parameter] = {p.name: p for p in parameters(_shared)[1]}
FROM_MODEL = ("model", "seed", "device", "device_map", "dtype")
FROM_FEATURE = ("feature", *FROM_MODEL)
EDITED = ("features", "edit", "strength", "unit", "positions")
CHAT = ("chat", "template_arg", "system")
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {}
"""Every command by name, with the examples under its help."""


def command(name: str, *examples: str, takes: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Register a function of a `Run` and its own options as the command `name`; `takes` adds shared options, those of `SHARED`."""

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        shared = [p for n, p in SHARED.items() if n in {*takes, "json", "out", "quiet"}]

        def run(**given: Any) -> None:
            with Run({p.name: given.pop(p.name) for p in shared}) as opened:
                opened.check_names(given)
                function(opened, **given)

        run.__doc__, own = parameters(function)
        found = sorted([*own, *shared], key=lambda p: p in own or p.default is not p.empty)
        run.__signature__ = inspect.Signature(found)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in found}
        COMMANDS[name] = (run, "Example: " + "\n\nor: ".join(examples))
        return function

    return wrap


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`2/4` as (2, 4)."""
    if text is None:
        return None
    i, mark, n = text.partition("/")
    if not (mark and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise RequestError(f"--shard {text!r}: expected I/N with 1 ≤ I ≤ N, such as 1/4.")
    return int(i), int(n)


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """`"0,-5,-10"` as numbers."""
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RequestError(
            f'{option} {text!r}: expected numbers with commas between, such as "0,-5,-10".'
        ) from None
    if not found:
        raise RequestError(f'{option} holds no number; expected e.g. "0,-5,-10".')
    return found


def once(given: Sequence[str], option: str) -> Sequence[str]:
    """What an option that may be repeated was given, each value once.

    Raises:
        RequestError: a value given twice.
    """
    for value in given:
        if given.count(value) > 1:
            raise RequestError(f"{option} {value} is given twice; give it once.")
    return given


def ask_to_send(cost: Any) -> bool:
    """Consent to paid requests, typed at a terminal; refused where there is no terminal."""
    print(str(cost), file=sys.stderr)
    if not sys.stdin.isatty():
        return False
    return typer.confirm("Send them?", err=True)


# --- what a command prints ---
class Console:
    """Standard output of one command."""

    def __init__(self, json: bool, quiet: bool):
        self.json, self.quiet = json, quiet
        self.stdout = sys.stdout
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._stack.enter_context(_threads_said(self.talks))
        if not self.talks:
            self._stack.enter_context(_no_hub_bars())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def talks(self) -> bool:
        """Whether more than the headline is wanted."""
        return not (self.json or self.quiet)

    @property
    def progress(self) -> bool:
        """Whether progress bars (with the time left) may be drawn, on standard error."""
        return self.talks and sys.stderr.isatty()

    def say(self, line: str) -> None:
        """A line of the headline."""
        if not self.json:
            print(line, file=self.stdout)

    def note(self, line: str) -> None:
        """A remark, left out under --quiet."""
        if self.talks:
            print(line, file=self.stdout)

    def warn(self, line: str) -> None:
        """A warning, always, on standard error."""
        print(f"sae-bias: warning: {line}", file=sys.stderr)

    def table(self, title: str, frame: "pd.DataFrame", columns: Mapping[str, str]) -> None:
        """Rows of `frame` under the labels of `columns` (those it has), left out under --quiet."""
        if not self.talks:
            return
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        names = [c for c in columns if c in frame]
        for name in names:
            numeric = frame[name].dtype.kind in "fiu"
            table.add_column(Text(columns[name]), justify="right" if numeric else "left", overflow="fold")
        for row in frame[names].itertuples(index=False):
            table.add_row(*(Text(number(v)) for v in row))
        screen = RichConsole(file=self.stdout, highlight=False)
        if not screen.is_terminal:
            screen.width = max(screen.width, _PIPED_WIDTH)
        screen.print(table)

    def finish(self, data: Mapping[str, Any]) -> None:
        """The JSON object, where it was asked for."""
        if self.json:
            from sae_bias.core.files import plain

            print(json_module.dumps(plain(dict(data)), allow_nan=False), file=self.stdout)


def number(value: Any) -> str:
    """A value as a table shows it."""
    from sae_bias.core import text

    if value is None or not (isinstance(value, str | bool) or hasattr(value, "__float__")):
        return UNDEFINED if value is None else str(value)
    return text.number(value, missing=UNDEFINED)


@contextlib.contextmanager
def _no_hub_bars() -> Any:
    """No download bars of the hub meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    yield
    if not before:
        enable_progress_bars()


@contextlib.contextmanager
def _threads_said(talks: bool) -> Any:
    """The number of threads follows the model's size meanwhile; it is said on standard error."""
    before = SAY_THREADS[0]
    SAY_THREADS[0] = (
        (lambda line: print(f"sae-bias: {line}", file=sys.stderr)) if talks else lambda line: None
    )
    try:
        yield
    finally:
        SAY_THREADS[0] = before


# --- one command at work ---
class Run(Console):
    """One command: what its shared options name, opened when first asked for, and the folder that keeps what is found."""

    def __init__(self, given: Mapping[str, Any]):
        super().__init__(given["json"], given["quiet"])
        self.given = given
        self.out: Path | None = given["out"]
        self.seed: int = given.get("seed", 0)
        self.saes: list[Sae] = []
        self.fidelity: list[Fidelity] = []
        self.model: Model | None = None
        self._logits: float | None = None

    def check_names(self, own: Mapping[str, Any]) -> None:
        """Models, SAEs, run folders and files that are not there are told before torch is imported."""
        from sae_bias.models.names import check_name
        from sae_bias.saes.ids import FeatureRef, SaeId

        given = {**self.given, **own}

        def named(*names: str) -> list[Any]:
            return [value for name in names for value in _listed(given.get(name))]

        for what, paths in (
            ("study file", named("study", "studies")),
            ("run folder", named("folder", "runs")),
        ):
            for path in paths:
                if not Path(path).exists():
                    raise RequestError(f"there is no {what} {path}.")
        for model in named("model", "of"):
            check_name(model)
        features = [FeatureRef.parse(f).sae for f in named("feature", "features")]
        for sae in [*features, *(SaeId.parse(s) for s in named("sae"))]:
            sae.check_name()
        for name in ("pairs", "grid"):
            if self.given.get(name) is not None:
                getattr(self, name)

    @property
    def shard(self) -> tuple[int, int] | None:
        return parse_shard(self.given["shard"])

    @cached_property
    def pairs(self) -> "PromptPairs":
        from sae_bias.prompts.load import load_pairs

        return load_pairs(self.given["pairs"])

    @cached_property
    def grid(self) -> "PromptGrid":
        from sae_bias.prompts.load import load_grid

        return load_grid(self.given["grid"])

    @cached_property
    def probe(self) -> "Probe":
        """The probe of --words, else of the pairs file's own words, else the bundled one."""
        from sae_bias.probe.words import default_probe
        from sae_bias.prompts.load import load_lexicon

        words = self.given["words"]
        score = self.given.get("score", "mean_logit")
        return default_probe(self.pairs, None if words is None else load_lexicon(words), score=score)

    @cached_property
    def split(self) -> "dict[str, tuple[str, ...]] | None":
        """Templates to discover, tune and report on (docs/method.md#splits): those of the run in --split or --out, else --seed's.

        None with too few templates to hold some out. Where a run's split is not --seed's, that is said.
        """
        from sae_bias.runs.manifest import split_of
        from sae_bias.stats.design import fewest_units

        seeded = self.pairs.split(self.seed) if len(self.pairs.templates) >= 2 * fewest_units() else None
        named: Path | None = self.given.get("split")
        kept, taken = ({} if f is None else split_of(f, self.pairs) for f in (self.out, named))
        if named is not None and not taken:
            raise RequestError(f"--split {named}: that folder holds no split of these pairs' templates.")
        if kept and taken and kept != taken:
            raise RequestError(
                f"{self.out} was made under another split than {named}: the report templates of the one were read by the other; choose another --out."
            )
        if (found := taken or kept) and found != seeded:
            self.warn(
                f"the split of {named or self.out} is used, not that of --seed {self.seed}: its report templates found nothing."
            )
        return found or seeded

    @cached_property
    def feature(self) -> "Feature":
        from sae_bias.saes.load import as_feature

        return as_feature(self.given["feature"])

    @cached_property
    def features(self) -> "list[Feature]":
        """Each --feature; one given twice is refused."""
        from sae_bias.saes.load import as_feature

        return [as_feature(f) for f in once(self.given["features"] or (), "--feature")]

    @cached_property
    def edits(self) -> "list[Intervention]":
        """--edit of every --feature, together, --strength as an activation: a wrong request is told before the model loads."""
        self.check_unit()
        return self._edits([1.0] * len(self.features))

    def edits_in(self, model: "Model") -> "list[Intervention]":
        """`edits` with --strength in the unit asked for."""
        return self.edits if self.given["strength"] is None else self._edits(self.sizes(model))

    def check_unit(self) -> None:
        """Refuse a --unit that is none, and one that --edit has not."""
        from sae_bias.steering.intervention import edit_class_of

        unit, edit = self.given["unit"], self.given["edit"]
        if unit not in ("act", "max"):
            raise RequestError(f"--unit {unit!r}: expected act or max.")
        if unit == "max" and not edit_class_of(edit).in_activation:
            raise RequestError(
                f"--unit max is about clamp, cap and steer; {edit} has no strength in activations."
            )

    def sizes(self, model: "Model") -> list[float]:
        """What a strength of 1 is for each --feature: 1, or its largest activation on the bundled pairs."""
        from sae_bias.prompts.load import load_pairs
        from sae_bias.steering.controls import observed_max

        whole = self.given["unit"] == "max"
        return [observed_max(model, f, load_pairs()) if whole else 1.0 for f in self.features]

    def _edits(self, sizes: Sequence[float]) -> "list[Intervention]":
        strength = self.given["strength"]
        if strength is not None and not self.features:
            raise RequestError("--strength needs --feature, the feature to edit.")
        value, *more = (None,) if strength is None else parse_numbers(strength, "--strength")
        if more:
            raise RequestError(
                f"--strength {strength!r}: one value here; `sweep` and `generate` take several."
            )
        return self.edits_at(value, sizes)

    def edits_at(self, value: float | None, sizes: Sequence[float]) -> "list[Intervention]":
        """--edit of every --feature at one strength, in units of `sizes`."""
        from sae_bias.steering.intervention import edit_of

        kind, positions = self.given["edit"], self.given["positions"]
        return [
            edit_of(kind, f.ref, None if value is None else value * size, positions=positions)
            for f, size in zip(self.features, sizes, strict=True)
        ]

    @property
    def chat(self) -> dict[str, Any]:
        """`chat` and `system` as the library takes them."""
        return {"chat": self.given["chat"], "system": self.given["system"]}

    def load(self, name: str) -> "Model":
        """A model by name, on the device and in the dtype asked for."""
        from sae_bias.models.load import load_model

        model = load_model(
            name, device=self.given["device"], dtype=self.given["dtype"], device_map=self.given.get("device_map"),
            template_arguments=_template_arguments(self.given.get("template_arg")),
        )  # fmt: skip
        model.pin_chat({"date": self._earlier_chat(name).get("date")})
        self.say_terms(model.gguf)
        return model

    def say_terms(self, gguf: Mapping[str, Any] | None) -> None:
        """The terms of use of a packaged model."""
        if gguf and gguf.get("terms"):
            self.note(f"{gguf['terms']}.")

    def _earlier_chat(self, name: str) -> Mapping[str, Any]:
        """What --out says of this model's chats, where it holds a run: it goes on with the date of its first day."""
        from sae_bias.runs.folder import RunFolder

        if self.out is None or not RunFolder(self.out).has_json("manifest"):
            return {}
        facts = RunFolder(self.out).read_json("manifest").get("model") or {}
        return (facts.get("chat") or {}) if facts.get("name") == name else {}

    def open(self, *saes: Any, gate: bool = True) -> "Model":
        """The model, after the SAEs' headers; the fidelity gate compares them (docs/method.md#fidelity-gate).

        Raises:
            RequestError: an SAE of another width or layer than the model's.
            GateError: the captured residual is not Hugging Face's hidden state.
        """
        from sae_bias.measures.fidelity import gate_model
        from sae_bias.saes.load import load_sae

        self.saes = [load_sae(s) for s in dict.fromkeys(saes)]
        model = self.model = self.load(self.given["model"])
        self.check(model, self.saes)
        self._logits = gate_model(model) if gate and not saes else None
        return model

    def check(self, model: "Model", saes: "Sequence[Sae]") -> None:
        """The gate of some SAEs: stops on a wrong residual, warns on a doubtful SAE."""
        from sae_bias.measures.fidelity import gate_sae
        from sae_bias.saes.sae import check_sae

        for sae in saes:
            check_sae(model, sae)
        found = [gate_sae(model, sae) for sae in saes]
        self.fidelity += found
        for fidelity in found:
            for warning in fidelity.warnings:
                self.warn(warning)

    @property
    def gate(self) -> dict[str, Any]:
        """The gate's figures, as a manifest holds them."""
        from sae_bias.measures.fidelity import Gate

        return Gate(tuple(self.fidelity), self._logits).facts()

    def note_gate(self) -> None:
        """The figures of the SAEs in one line; their warnings were said before."""
        from sae_bias.measures.fidelity import gate_lines

        if self.fidelity:
            self.note(gate_lines(self.gate)[0])

    def facts(self, **more: Any) -> dict[str, Any]:
        """The manifest of this run; `more` may name another model, SAEs, prompts."""
        from sae_bias.runs.manifest import manifest

        given = {"saes": self.saes, "seed": self.seed, "gate": self.gate, **more}
        return manifest(given.pop("model", self.model), **given)

    def save(
        self, tables: "Mapping[str, pd.DataFrame]", summary: Mapping[str, Any] | None = None, *, shard: tuple[int, int] | None = None,
        facts: Mapping[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """Manifest (made of `more` unless given), tables and summary into --out, which several commands may share; nothing without it.

        A folder of another model or of other pairs is refused, never mixed.
        """
        if self.out is None:
            return
        from sae_bias.runs.folder import RunFolder
        from sae_bias.runs.manifest import write_manifest

        folder = RunFolder(self.out, shard=shard)
        with folder.writing():
            write_manifest(folder, dict(facts) if facts is not None else self.facts(**more))
            for name, frame in tables.items():
                folder.write_table(name, frame)
            folder.add_summary(summary or {})

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """DIR/NAME.json, where --out names a folder."""
        if self.out is not None:
            from sae_bias.runs.folder import RunFolder

            RunFolder(self.out).write_json(name, dict(data))

    def done(self, data: Mapping[str, Any]) -> None:
        """The JSON object: the model, what was found, the gate, the folder."""
        model = {} if self.model is None else {"model": self.model.name}
        gate = {"gate": self.gate} if self.fidelity else {}
        self.finish({**model, **data, **gate, "out": None if self.out is None else str(self.out)})


def picked(found: Any, names: str) -> dict[str, Any]:
    """Some fields of a result by name, for JSON."""
    return {name: getattr(found, name) for name in names.split()}


def rows(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """A table's rows for JSON; what was not measured is null."""
    found = frame.astype(object).where(frame.notna(), None)
    return [{str(k): v for k, v in row.items()} for row in found.to_dict(orient="records")]


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Path) else list(given or ())


def _template_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """`enable_thinking=false` as a name and a value; a value that is not JSON is text."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, mark, value = text.partition("=")
        if not mark or not name.strip():
            raise RequestError(
                f"--template-arg {text!r}: expected NAME=VALUE, such as enable_thinking=false."
            )
        if name.strip() in found:
            raise RequestError(f"--template-arg {name.strip()} is given twice; give it once.")
        try:
            found[name.strip()] = json_module.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found
