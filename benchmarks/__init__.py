"""Dense against sparse: the reference implementation, and the commands that time it."""


def run(*args, **kwargs):
    """See :func:`benchmarks.compare.run`; imported on the first call, since it needs torch."""
    from .compare import run as run_benchmark

    return run_benchmark(*args, **kwargs)


def run_knn(*args, **kwargs):
    """See :func:`benchmarks.knn.run`."""
    from .knn import run as run_benchmark

    return run_benchmark(*args, **kwargs)


__all__ = ["run", "run_knn"]
