"""`sae-bias report`: run folders into one HTML file."""

from pathlib import Path

from sae_bias.cli.context import Run, command


@command(
    "report",
    "sae-bias report runs/demo",
    takes=(),
)
def report(run: Run, runs: list[Path], format: str = "html") -> None:
    """Write one report over run folders; nothing is measured again.

    The HTML is one file that opens without a network. Without --out it stands in the run's own folder.

    Args:
        RUN...: Run folders; several stand side by side.
        --format: html, or md for a paper's appendix.
    """
    from sae_bias.report.page import write_report

    out = run.out
    if out is not None and not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
    path = write_report(*runs, out=out, format=format)
    run.say(f"report: {path}")
    run.finish({"report": str(path), "runs": [str(r) for r in runs], "format": format})
