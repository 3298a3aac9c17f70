"""A report section from outside the package, as a plugin brings it."""

from sae_bias.core import text
from sae_bias.report.parts import Section, run_table
from sae_bias.report.sections import section
from sae_bias.runs.folder import Run


@section("Rivers", table="rivers")
def rivers_section(run: Run) -> Section:
    """The longest of some rivers."""
    frame = run.tables["rivers"]
    longest = frame.loc[frame["km"].idxmax()]
    said = f"The longest is the {longest['river']}, {text.number(longest['km'])} km."
    return Section(
        "rivers", "Rivers", said, table=run_table(run, "rivers", {"river": "river", "km": "length"})
    )
