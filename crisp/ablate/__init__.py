"""`crisp ablate`: the paper's ablations as ordinary runs, their evaluations, and the paper's tables beside ours."""
