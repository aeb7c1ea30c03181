"""Whether DALI, which comes with the extras `cuda13` and `cuda12`, is installed."""


def dali_available() -> bool:
    """Whether `crisp.pipelines.dali` can be imported here."""
    try:
        import nvidia.dali  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
