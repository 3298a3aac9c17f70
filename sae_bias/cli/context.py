"""What the commands share: their options, what a command prints, and one `Run` that opens what the options name and keeps what is found.

    @command("card", "sae-bias card MODEL FEATURE", takes=(*FEATURE, "grid"))
    def card(run: Run, texts: TextFile = None) -> None: ...

`takes` names shared options by their Python name; `--json`, `--out` and `--quiet` come with every command. What a library prints goes to standard error.
"""

import contextlib
import inspect
import json as json_module
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

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


EDITS = "ablate, scale, clamp, cap, mean, steer, project_out, or one that a plugin brings"
UNDEFINED = "–"
_PIPED_WIDTH = 160


# --- options ---
def option(*names: str, help: str, **more: Any) -> Any:
    """A `typer.Option` that does not print its default where that is nothing."""
    return typer.Option(*names, help=help, show_default=False, **more)


Out = Annotated[Path | None, option("--out", metavar="DIR", help="Folder to write to.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else on standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the headline: no tables, no progress.")]
Pairs = Annotated[
    str | None,
    option(
        "--pairs",
        metavar="FILE",
        help="Pairs file (.yaml, .csv, .jsonl) or a bundled name (treatment, survival-2, gender …); the bundled 280 by default.",
    ),
]
Words = Annotated[
    str | None,
    option(
        "--words",
        metavar="FILE",
        help="YAML file with lists `positive` and `negative`; the bundled words by default.",
    ),
]
Grid = Annotated[str | None, option("--grid", metavar="FILE", help="Grid file; the bundled grid by default.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16.")
]
DeviceMap = Annotated[str | None, option("--device-map", metavar="MAP", help="How accelerate spreads a model too large for one device, such as auto; --device is then not used.")]  # fmt: skip
Workers = Annotated[int | None, option("--workers", min=1, help="Processes for exact effects and the sweep's cells: on this machine's CPU they share one copy of the weights, a thread each.")]  # fmt: skip
Shard = Annotated[
    str | None,
    option("--shard", metavar="I/N", help="Run every N-th cell, from the I-th; join with `sae-bias merge`."),
]
SHARED: Mapping[str, tuple[Any, Any]] = {
    "model": (Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or organism:planted.", show_default=False)], ...),
    "feature": (Annotated[str, typer.Argument(metavar="FEATURE", help="RELEASE/SAE_ID#INDEX, or path/to/sae_folder#INDEX.", show_default=False)], ...),
    "features": (Annotated[list[str] | None, option("--feature", metavar="FEATURE", help="Feature to edit; given several times, they are edited together. None measures the unsteered model only.")], None),
    "edit": (Annotated[str, typer.Option("--edit", help=EDITS + ".")], "ablate"),
    "strength": (Annotated[str | None, option("--strength", help="Value of the edit; ablate has none.", metavar="NUMBER")], None),
    "unit": (Annotated[str, typer.Option("--unit", help="act: strengths as activations are; max: times each feature's largest activation on the bundled pairs.")], "act"),
    "positions": (Annotated[str, typer.Option("--positions", help="Where the edit acts: all, last, subject, prompt or generated (special tokens never).")], "all"),
    "chat": (Annotated[bool, typer.Option("--chat", help="Put each prompt in a user turn of the model's chat template.")], False),
    "system": (Annotated[str | None, option("--system", metavar="TEXT", help="System prompt put before every prompt.")], None),
    "template_arg": (Annotated[list[str] | None, option("--template-arg", metavar="NAME=VALUE", help="Given to the chat template, such as enable_thinking=false; several times.")], None),
    "grid": (Grid, None),
    "pairs": (Pairs, None),
    "words": (Words, None),
    "randomized_sae": (Annotated[bool, typer.Option("--randomized-sae", help="The same in a randomized SAE too, as a control: what it finds is the search's own yield.")], False),
    "score": (Annotated[str, typer.Option("--score", help="mean_logit, logodds or auroc.")], "mean_logit"),
    "seed": (Annotated[int, typer.Option("--seed", help="Seed of every random choice.")], 0),
    "split": (Annotated[Path | None, option("--split", metavar="RUN", help="Run folder whose split of templates is used, such as the ranking's that found the feature; by default that in --out, else --seed's.")], None),
    "device": (Device, "auto"),
    "device_map": (DeviceMap, None),
    "dtype": (Dtype, "auto"),
    "json": (Json, False),
    "out": (Out, None),
    "quiet": (Quiet, False),
}  # fmt: skip
FROM_MODEL = ("model", "seed", "device", "device_map", "dtype")
FROM_FEATURE = ("feature", *FROM_MODEL)
EDITED = ("features", "edit", "strength", "unit", "positions")
CHAT = ("chat", "template_arg", "system")
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {}
"""Every command by name, with the examples under its help."""


def command(name: str, *examples: str, takes: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Register a function of a `Run` and its own options as the command `name`; `takes` adds shared options, those of `SHARED`."""

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]
        shared = [n for n in SHARED if n in {*takes, "json", "out", "quiet"}]

        def run(**given: Any) -> None:
            with Run({n: given.pop(n) for n in shared}) as opened:
                opened.check_names(given)
                function(opened, **given)

        added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if SHARED[n][1] is ... else SHARED[n][1], annotation=SHARED[n][0]) for n in shared]  # fmt: skip
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        named = [p for p in added if p.default is p.empty]
        parameters = [*named, *own, *(p for p in added if p not in named)]
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        COMMANDS[name] = (run, example(*examples))
        return function

    return wrap


def example(*lines: str) -> str:
    """A command's epilog: its example lines."""
    return "Example: " + "\n\nor: ".join(lines)


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


def make_edit(
    kind: str, feature: Any, strength: float | None, *, positions: str, when: str = "active"
) -> "Intervention":
    """One intervention from --edit and --strength."""
    from sae_bias.steering.intervention import edit_of

    return edit_of(kind, feature, strength, positions=positions, when=None if when == "active" else when)


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
        for name, what in (
            ("study", "study file"),
            ("studies", "study file"),
            ("folder", "run folder"),
            ("runs", "run folder"),
        ):
            for path in _listed(given.get(name)):
                if not Path(path).exists():
                    raise RequestError(f"there is no {what} {path}.")
        for name in filter(None, (given.get("model"), given.get("of"))):
            check_name(name)
        named = _listed(given.get("feature")) + _listed(given.get("features"))
        for sae in [FeatureRef.parse(f).sae for f in named] + [
            SaeId.parse(s) for s in _listed(given.get("sae"))
        ]:
            sae.check_name()
        for name in ("pairs", "grid"):
            if self.given.get(name) is not None:
                getattr(self, name)

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
        return [
            make_edit(
                self.given["edit"],
                f.ref,
                None if value is None else value * size,
                positions=self.given["positions"],
            )
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
        from sae_bias.runs.summary import gate_facts

        return gate_facts(self.fidelity, True, self._logits)

    def note_gate(self) -> None:
        """The gate's figures in one line."""
        found = self.fidelity
        error = max((f.residual_max_rel_error for f in found), default=0.0)
        parts = [
            f"{f.sae}: unexplained variance {f.fvu:.3f}, L0 {f.l0:.1f}"
            + (f" (label {f.label_l0:.0f})" if f.label_l0 else "")
            for f in found[:4]
        ]
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        if found:
            self.note(
                f"fidelity: residual as Hugging Face's to {error:.1e} of its size; {'; '.join(parts)}{more}"
            )

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
