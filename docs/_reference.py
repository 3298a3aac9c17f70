"""Generates the reference pages while MkDocs builds: from the stub of public names, the commands' own help, `Study` and the figures.

A public name without a docstring or without a group, a command without an example, a study field without a docstring: each stops the build.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sae_bias"

GROUPS = {
    "Models": ["load_model", "Model", "Site", "residuals"],
    "Prompts": [
        "load_pairs", "PromptPair", "PromptPairs", "load_grid", "PromptGrid", "load_contrast", "Contrast", "load_scenarios", "Scenario",
        "Scenarios",
    ],
    "The probe": ["Probe", "run_probe", "ProbeResult", "run_checks"],
    "SAEs and features": ["load_sae", "load_feature", "Sae", "Feature", "SaeId", "FeatureRef"],
    "Finding features": [
        "rank_features", "Ranking", "activation_table", "token_activations", "TokenActivations", "feature_card", "causal_ladder",
        "match_features", "resolve_index",
    ],
    "Interventions": [
        "intervene", "Ablate", "Scale", "Clamp", "Cap", "SetMean", "Resample", "Steer", "ProjectOut", "Patch", "Reconstruct",
        "Direction", "difference_of_means", "ridge_probe", "Receipt", "generate", "Completion",
    ],
    "Measuring": [
        "Sweep", "run_sweep", "compare_methods", "specificity", "score_scenarios", "ScenarioResult", "identity_sweep", "side_by_side",
        "Judge", "run_judge",
    ],
    "Studies and runs": ["Study", "run_study", "write_report", "verify_run"],
    "Errors": ["SaeBiasError", "RequestError", "MissingError", "GateError"],
}  # fmt: skip


def homes() -> dict[str, str]:
    """Public name -> the module it lives in."""
    stub = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    return {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as \2$", stub, re.M)}


def nodes(path: Path) -> dict[str, Any]:
    """Top-level functions and classes of a module, by name."""
    found = ast.parse(path.read_text(encoding="utf-8")).body
    return {n.name: n for n in found if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def docstring(name: str, module: str) -> str:
    """A public name's docstring; its first sentence says what it is."""
    node = nodes(ROOT / (module.replace(".", "/") + ".py")).get(name)
    return "" if node is None else (ast.get_docstring(node) or "")


def ungrouped() -> list[str]:
    """Public names that no group holds: they go under "More", so that none is missing."""
    grouped = {name for names in GROUPS.values() for name in names}
    return sorted(set(homes()) - grouped)


def python_page() -> str:
    """Every public name under its task."""
    home = homes()
    lines = [
        "# Python\n",
        "`import sae_bias as sb`; every name below is `sb.NAME`. Tensors are float32 with the shape in the annotation (`batch pos d_model`), scores and biases are in",
        "nats. What goes wrong on purpose raises one of the [errors](#errors), whose message says what was given, what was expected and what to try.\n",
    ]
    for group, names in [*GROUPS.items(), ("More", ungrouped())]:
        present = [n for n in names if n in home]
        if not present:
            continue
        lines += [f"## {group}\n", "| name | |", "|---|---|"]
        for name in present:
            text = docstring(name, home[name])
            if not text:
                raise SystemExit(f"{home[name]}.{name} is public and has no docstring")
            lines.append(f"| [`{name}`](#{home[name]}.{name}) | {first_sentence(text)} |")
        lines += ["", *(f"::: {home[name]}.{name}\n" for name in present)]
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    return cell(re.split(r"(?<=\.)\s|;\s|\n\n", text.strip())[0].rstrip(".?") + ".")


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> dict[str, Any]:
    """Name -> click command, in the order of the help."""
    import typer

    from sae_bias.cli.main import build_app

    app: Any = typer.main.get_command(build_app())
    return {name: app.commands[name] for name in app.list_commands(None) if not app.commands[name].hidden}


def commands_page() -> str:
    """Every command from its own help."""
    found = commands()
    lines = [
        "# Commands\n",
        "Exit codes: 0 done, 2 the request is wrong, 3 something is missing (and what gets it), 4 it ran and the answer is no, 1 a defect.\n",
        "| command | |",
        "|---|---|",
        *(f"| [`{name}`](#sae-bias-{name}) | {first_sentence(c.help or '')} |" for name, c in found.items()),
    ]
    for name, command in found.items():
        lines += ["", f"## sae-bias {name}\n", plain(command.help or ""), ""]
        rows = [option_row(p) for p in command.params if not getattr(p, "hidden", False)]
        lines += ["| | default | |", "|---|---|---|", *rows, ""]
        lines += examples(command.epilog or "")
    return "\n".join(lines)


def plain(text: str) -> str:
    return re.sub(r"\[/?\w+\]", "", text).replace("<", "&lt;").replace("\b", "")


def option_row(param: Any) -> str:
    """One argument or option: how it is written, its default, its help."""
    is_flag = getattr(param, "is_flag", False)
    if isinstance_argument(param):
        written = f"`{param.metavar or param.name.upper()}`"
    else:
        written = ", ".join(f"`{o}`" for o in (*param.opts, *param.secondary_opts))
        written += "" if is_flag else f" {cell(param.metavar or kind(param))}"
    default = param.default
    shown = "" if default is None or callable(default) or default in ((), [], False, True) else f"`{default}`"
    shown = "required" if param.required else shown
    return f"| {written} | {shown} | {cell(plain(getattr(param, 'help', '') or ''))} |"


def isinstance_argument(param: Any) -> bool:
    return not param.opts[0].startswith("-")


def kind(param: Any) -> str:
    """What an option's value is, from its annotation."""
    annotation = param.type_descriptor.annotation
    return getattr(annotation, "__name__", str(annotation)).upper().replace("STR", "TEXT").replace("INT", "N")


def examples(epilog: str) -> list[str]:
    """The example lines that end a command's help."""
    found = re.findall(r"sae-bias [^\n`]+", re.sub(r"\[/?\w+\]", "", epilog))
    return ["```bash", *(line.strip() for line in found), "```"] if found else []


def study_page() -> str:
    """Every field of a study file."""
    lines = [
        "# Study file\n",
        "`sae-bias run study.yaml --out runs/NAME` measures everything that the file names. The same fields are those of `sb.Study` in Python; a field that is not listed here is refused.\n",
    ]
    for name, node in nodes(PACKAGE / "workflows" / "study_file.py").items():
        if isinstance(node, ast.ClassDef) and any(isinstance(n, ast.AnnAssign) for n in node.body):
            lines += [
                f"## {name}\n",
                ast.get_docstring(node) or "",
                "",
                "| field | type | default | |",
                "|---|---|---|---|",
            ]
            lines += [f"| `{a}` | {cell(t)} | {cell(d)} | {cell(doc)} |" for a, t, d, doc in fields(node)]
            lines.append("")
    return "\n".join(lines)


def fields(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(name, type, default, docstring) of each annotated field."""
    found = []
    for i, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        after = node.body[i + 1] if i + 1 < len(node.body) else None
        text = ast.literal_eval(after.value) if is_text(after) else ""
        default = "required" if item.value is None else f"`{ast.unparse(item.value)}`"
        found.append((item.target.id, f"`{ast.unparse(item.annotation)}`", default, str(text)))
    return found


def is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def figures_page() -> str:
    """Every figure of the report, and how each is read."""
    lines = [
        "# Figures of the report\n",
        "Each is drawn from one table of the [run folder](../guides/run_folder.md); every result that has `.plot()` gives one of them too. Gaps are what was not measured, never 0.\n",
    ]
    for path in sorted((PACKAGE / "figures").glob("*.py")):
        if path.stem in ("__init__", "style"):
            continue
        drawn = [(n, ast.get_docstring(f)) for n, f in nodes(path).items() if draws(f)]
        if drawn:
            lines += [f"## {path.stem.replace('_', ' ').capitalize()}\n", "| figure | shows |", "|---|---|"]
            lines += [f"| `{name}` | {cell(text or '')} |" for name, text in drawn]
            lines.append("")
    lines += ["## How to read them\n"]
    for path in sorted((PACKAGE / "report" / "sections").glob("*.py")):
        for title, text in reading(path):
            lines += [f"**{title}**: {text}\n"]
    return "\n".join(lines)


def draws(node: Any) -> bool:
    """Whether a function is public and gives a plotly figure."""
    returns = ast.unparse(node.returns) if isinstance(node, ast.FunctionDef) and node.returns else ""
    return "Figure" in returns and not node.name.startswith("_")


def reading(path: Path) -> list[tuple[str, str]]:
    """(title, how to read it) of each section a module builds, where both are plain strings."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (
            isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Section") and len(node.args) > 1
        ):
            continue
        how = next((k.value for k in node.keywords if k.arg == "how_to_read"), None)
        if isinstance(node.args[1], ast.Constant) and isinstance(how, ast.Constant):
            found.append((str(node.args[1].value), " ".join(str(how.value).split())))
    return found


PAGES = {
    "reference/python.md": python_page,
    "reference/commands.md": commands_page,
    "reference/study_file.md": study_page,
    "reference/figures.md": figures_page,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A heading of the method page cited in a docstring or in help becomes a link."""
    up = "../" * page.url.count("/")
    return re.sub(
        r"(?:<code>)?docs/(method|published)\.md#([\w-]+)(?:</code>)?",
        lambda m: f'<a href="{up}{m[1]}/#{m[2]}">{m[2].replace("-", " ")}</a>',
        html,
    )
