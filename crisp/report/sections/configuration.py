"""What was chosen: against the recipe, against each other, and all of it."""

from collections.abc import Sequence

from crisp.report.blocks import ALL, Block, Note, Section, Table
from crisp.report.gather import RunRecord, differences, shown


def configuration(runs: Sequence[RunRecord]) -> Section:
    """Differences first, the whole folded."""
    blocks: list[Block] = []
    if len(runs) > 1:
        fields = differences(runs)
        heads = ["field", *(run.name for run in runs)]
        if fields:
            rows = [[name, *(shown(run.config[name]) for run in runs)] for name in fields]
            blocks.append(Table(caption="Differences between the runs", heads=heads, rows=rows, words=ALL))
        else:
            blocks.append(Note(text="The runs have the same configuration."))
    for recipe in dict.fromkeys(run.recipe for run in runs):
        blocks += _changes(recipe, [run for run in runs if run.recipe == recipe])
    rows = [[name, *(shown(run.config[name]) for run in runs)] for name in runs[0].config]
    blocks.append(
        Table(
            caption=f"All {len(rows)} fields",
            heads=["field", *(run.name for run in runs)],
            rows=rows,
            words=ALL,
            folded=True,
        )
    )
    return Section(id="configuration", title="Configuration", blocks=blocks)


def _changes(recipe: str, runs: Sequence[RunRecord]) -> list[Block]:
    """Against the recipe that all of these began as."""
    changes = [run.changes for run in runs if run.changes is not None]
    if not changes:
        return [Note(text=f"This version of crisp has no recipe {recipe!r} to compare with.")]
    of_recipe = {name: before for of_run in changes for name, (before, _) in of_run.items()}
    if not of_recipe:
        return [Note(text=f"{', '.join(run.name for run in runs)}: the recipe {recipe} as it stands.")]
    return [
        Table(
            caption=f"Against the recipe {recipe}",
            heads=["field", "recipe", *(run.name for run in runs)],
            rows=[
                [name, shown(before), *(shown(run.config[name]) for run in runs)] for name, before in of_recipe.items()
            ],
            words=ALL,
        )
    ]
