"""`sae-bias plan`: what a study costs, before any weight is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sae_bias.cli.context import Console, Run, command, picked
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    import pandas as pd

    from sae_bias.workflows.plan import ModelPlan, StudyPlan
    from sae_bias.workflows.plan_costs import Step


SUMS = "seconds flops download_bytes disk_bytes"
STEP_COLUMNS = columns_of(
    "model; step; operations; time; device: on the device; parts: beside the weights; read; host: tables"
)
TOTAL_COLUMNS = columns_of(
    "model; parameters; weights; peak: at most; step: in step; fits; time; saes: SAEs; "
    "download: to download; disk: run folder"
)


@command(
    "plan",
    "sae-bias plan study.yaml --hardware h200",
    "sae-bias plan study.yaml --hardware cpu --json",
    takes=(),
)
def plan(
    run: Run,
    studies: list[Path],
    hardware: str = "h200",
    flops: Annotated[float | None, {"min": 1.0}] = None,
    dtype: str | None = None,
) -> None:
    """Say what a study needs: memory by part, operations, time, downloads, disk, and what to change where it does not fit.

    Nothing is loaded and no network is asked. Shapes come from the registry, from a folder's config.json, and from SAE names; tokens are
    counted from words and marks. Times are operations over an assumed share of the hardware's stated rate, plus reading files. Several
    study files are planned one after another and summed. With --out, the same is written there as plan.json.

    Args:
        STUDY.yaml…: Study files.
        --hardware NAME: h200, h100, a100, a100-40, l4, rtx4090, or cpu (this machine).
        --flops: With --hardware cpu: its float32 rate in operations a second; measured by default.
        --dtype: auto, float32, bfloat16, float16; the study's own by default.
    """
    from sae_bias.workflows.hardware import DISK_BYTES_PER_SECOND
    from sae_bias.workflows.hardware import hardware as named
    from sae_bias.workflows.plan import plan_study
    from sae_bias.workflows.study import load_study

    if flops is not None and hardware != "cpu":
        raise RequestError("--flops is for --hardware cpu; the others have their data sheets' rates.")
    machine = named(hardware, flops=flops)
    given = {} if dtype is None else {"dtype": _checked(dtype)}
    plans = [plan_study(load_study(path).model_copy(update=given), machine) for path in studies]
    rates = {
        "bfloat16_flops": machine.bfloat16,
        "float32_flops": machine.float32,
        "memory_bytes": machine.memory,
    }
    assumed = {
        "assumed_utilisation": machine.utilisation,
        "assumed_disk_bytes_per_second": DISK_BYTES_PER_SECOND,
    }
    found: dict[str, Any] = {
        "hardware": {**picked(machine, "name label source"), **rates, **assumed},
        "studies": [{"study": p.name, **picked(p, SUMS), "models": [_model_facts(m) for m in p.models]} for p in plans],
        **{name: sum(getattr(p, name) for p in plans) for name in SUMS.split()},
    }  # fmt: skip
    run.write_json("plan", found)
    _show(run, plans)
    if len(plans) > 1:
        run.say(f"in all: {_time(found['seconds'])}, {_size(found['download_bytes'])} to download, {_size(found['disk_bytes'])} of run folders")  # fmt: skip
    run.note(
        f"{machine.label}: {_rate(machine.bfloat16)} in bfloat16, {_rate(machine.float32)} in float32 ({machine.source}); "
        f"assumed: {machine.utilisation:.0%} of it, files read at {DISK_BYTES_PER_SECOND / 1e9:g} GB/s, tokens counted from words."
    )
    run.finish(found)


def _checked(dtype: str) -> str:
    from sae_bias.workflows.plan_shapes import BYTES

    if dtype not in ("auto", *BYTES):
        raise RequestError(f"--dtype {dtype!r}: expected auto, {', '.join(BYTES)}.")
    return dtype


def _show(console: Console, plans: "list[StudyPlan]") -> None:
    models = [m for p in plans for m in p.models]
    for study in plans:
        machine = study.models[0].hardware
        most = max(m.host_bytes if machine.is_cpu else m.device_bytes for m in study.models)
        where = machine.label if machine.is_cpu else f"one {machine.label}"
        console.say(
            f"{study.name}: {_time(study.seconds)} on {where}, {_size(most)} of memory at most, "
            f"{_size(study.download_bytes)} to download, {_size(study.disk_bytes)} for the run folder"
        )
        for model in study.models:
            for line in model.advice():
                console.say(f"  {model.model.name}: {line}")
    console.table("Models", _totals(models), TOTAL_COLUMNS)
    console.table("Steps", _steps(models), STEP_COLUMNS)


def _totals(models: "list[ModelPlan]") -> "pd.DataFrame":
    import pandas as pd

    rows = [
        (
            m.model.name, f"{m.model.n_params / 1e9:.2f} B" if m.model.n_params >= 1e8 else f"{m.model.n_params / 1e6:.1f} M",
            f"{_size(m.weights)} ({m.dtype})", _size(m.host_bytes if m.hardware.is_cpu else m.device_bytes), m.peak.name,
            "yes" if m.fits else "no", _time(m.seconds), f"{len(m.saes)} ({sum(s.d_sae for s in m.saes):,} features)" if m.saes else "none",
            _size(m.download_bytes), _size(m.disk_bytes),
        )
        for m in models
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(TOTAL_COLUMNS))


def _steps(models: "list[ModelPlan]") -> "pd.DataFrame":
    import pandas as pd

    rows = [
        (
            m.model.name, s.name, f"{s.flops:.1e}" if s.flops else "", _time(s.seconds), _size(m.resident + s.device_bytes),
            ", ".join(f"{name} {_size(size)}" for name, size in s.parts.items()), _size(s.read_bytes) if s.read_bytes else "",
            _size(s.host_bytes) if s.host_bytes else "",
        )
        for m in models
        for s in m.steps
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS))


def _model_facts(m: "ModelPlan") -> dict[str, Any]:
    return {
        **picked(m, f"dtype device_bytes host_bytes fits cells {SUMS}"), "model": m.model.name, "architecture": m.model.architecture,
        "parameters": m.model.n_params, "checkpoint_bytes": m.model.n_checkpoint_bytes, "weights_bytes": m.weights, "peak_step": m.peak.name,
        "advice": m.advice(), "saes": len(m.saes), "features": sum(s.d_sae for s in m.saes), "sae_bytes": sum(s.n_bytes for s in m.saes),
        "saes_not_counted": list(m.unknown_saes), "steps": [_step_facts(s) for s in m.steps],
    }  # fmt: skip


def _step_facts(s: "Step") -> dict[str, Any]:
    sizes = {"parts_bytes": s.parts, "table_bytes": s.host_bytes}
    return {"step": s.name, **picked(s, "flops token_layers seconds read_bytes"), **sizes}


def _size(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.0f} kB" if n else "nothing"


def _time(seconds: float) -> str:
    if seconds >= 3600 * 48:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s"
