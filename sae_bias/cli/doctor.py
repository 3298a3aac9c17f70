"""`sae-bias doctor`: what this machine has, and what works on it without a network."""

import json as json_module
from pathlib import Path
from typing import Any

from sae_bias.cli.context import Console, Run, command, picked


@command(
    "doctor",
    "sae-bias doctor",
    "sae-bias doctor google/gemma-3-12b-it",
    takes=("device_map",),
)
def doctor(run: Run, name: str | None = None) -> None:
    """Show versions, devices, the hub login, what is cached, and the bundled organisms.

    Nothing is sent anywhere: the login is only looked for, and the cache only listed. With --out, the same is written there as
    doctor.json.

    Args:
        [MODEL]: Say what this model lacks here, and list its SAEs: a hub id, a folder, a .gguf file.
    """
    from sae_bias.core.versions import versions
    from sae_bias.models.catalog import organism_names
    from sae_bias.saes.releases import organism_saes

    found: dict[str, Any] = {}
    if name is not None:
        from sae_bias.models.look import look_at

        found = {"model": look_at(name, run.given["device_map"]), "saes": _saes(name)}
    found |= {
        "versions": versions(),
        "devices": _devices(),
        "hub": _hub(),
        "cached": _cached(),
        "packaged": _packaged(),
        "organisms": {f"organism:{o}": organism_saes(o) for o in organism_names()},
    }
    run.write_json("doctor", found)
    _show(run, found, name)
    run.finish(found)


def _devices() -> list[dict[str, Any]]:
    import os

    import torch

    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    ]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = round(facts.total_memory / 1e9, 1)
        devices.append({"device": f"cuda:{i}", "name": facts.name, "memory_gb": memory})
    return devices


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    offline, cache = bool(constants.HF_HUB_OFFLINE), constants.HF_HUB_CACHE
    return {"logged_in": get_token() is not None, "offline": offline, "cache": cache}


def _packaged() -> list[dict[str, Any]]:
    """Pretrained models that pip can bring, and whether they are here."""
    import torch

    from sae_bias.models.gguf.convert import MANIFEST, kept_folder
    from sae_bias.models.gguf.packaged import PACKAGED

    return [
        picked(model, "name pip terms")
        | {"of": f"{model.of}, {model.quantization}", "installed": model.is_installed}
        | {"converted": (kept_folder(model.sha256, torch.float32) / MANIFEST).is_file()}
        for model in PACKAGED.values()
    ]


def _cached() -> list[dict[str, Any]]:
    """Models and SAE repositories in the hub cache, and whether each works with no network."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    rows = []
    for repo in sorted(repos, key=lambda r: r.repo_id):
        if repo.repo_type != "model":
            continue
        newest, files = max(repo.revisions, key=lambda r: r.last_modified, default=None), {}
        if newest is not None:
            files = {str(f.file_path.relative_to(newest.snapshot_path)): f.file_path for f in newest.files}
        gb = round(repo.size_on_disk / 1e9, 2)
        rows.append({"repo": repo.repo_id, "gb": gb, "offline": _works_offline(files)})
    return rows


def _works_offline(files: dict[str, Path]) -> str:
    """`model`, `N SAEs`, or `incomplete`: what can be loaded from these files alone."""
    weights = ("params.safetensors", "params.npz", "sae_weights.safetensors")
    if saes := sum(Path(name).name in weights for name in files):
        return f"{saes} SAE{'s' if saes > 1 else ''}"
    tokenizer = any(name in files for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return "model" if "config.json" in files and tokenizer and _weights(files) else "incomplete"


def _weights(files: dict[str, Path]) -> bool:
    index = files.get("model.safetensors.index.json")
    if index is None:
        return "model.safetensors" in files
    try:
        shards = set(json_module.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return shards <= set(files)


def _saes(model: str) -> list[str]:
    from sae_bias.models.catalog import ORGANISM, model_info
    from sae_bias.models.gguf.packaged import PACKAGED
    from sae_bias.saes.releases import organism_saes, residual_saes

    if model in PACKAGED:
        model = PACKAGED[model].of
    elif Path(model).expanduser().exists():
        return []
    if model.startswith(ORGANISM):
        return organism_saes(model)
    return residual_saes(model) if model_info(model) is not None else []


def _show(console: Console, found: dict[str, Any], model: str | None) -> None:
    if model is not None:
        _show_model(console, model, found["model"], found["saes"])
        return
    hub = found["hub"]
    console.say("  ".join(f"{name} {version}" for name, version in found["versions"].items()))
    for device in found["devices"]:
        memory = f", {device['memory_gb']} GB" if "memory_gb" in device else ""
        console.say(f"{device['device']}: {device['name']}{memory}")
    console.say(
        f"hub: {'logged in' if hub['logged_in'] else 'not logged in (hf auth login)'}, {'offline' if hub['offline'] else 'online'}"
    )
    for row in found["cached"]:
        console.note(f"cached: {row['repo']} ({row['gb']} GB): {row['offline']}")
    if not found["cached"]:
        console.note("cached: nothing")
    for row in found["packaged"]:
        state = "installed" if row["installed"] else f"not installed ({row['pip']})"
        console.say(f"packaged: {row['name']} ({row['of']}): {state}. {row['terms']}.")
    for organism, saes in found["organisms"].items():
        console.say(f"bundled: {organism} with {len(saes)} SAEs: {', '.join(saes)}")


def _show_model(console: Console, model: str, facts: dict[str, Any], saes: list[str]) -> None:
    """One screen: what it is, what is missing and what gets it, and its SAEs."""
    console.say(f"{model}: {facts['what']}")
    for line in facts["missing"]:
        console.say(f"missing: {line}")
    if not facts["missing"]:
        console.say("nothing is missing: it loads offline")
    for device, n in facts.get("device_map", {}).items():
        console.say(f"device map: {n} modules on {device}")
    if not saes:
        console.say("no SAEs are registered for this name; give a release's SAE or a folder by its own name")
        return
    console.say(f"{len(saes)} residual SAEs" + (":" if console.talks else ""))
    for name in saes[:20]:
        console.note(f"  {name}")
    if len(saes) > 20:
        console.note(f"  and {len(saes) - 20} more (--json lists them)")
