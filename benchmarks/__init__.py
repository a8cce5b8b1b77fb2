"""Benchmarks: the dense reference of the sparse form, and what is timed and scored against it."""


def run(tasks, sizes, out, device, implementations=None, precision="float32", **more) -> None:
    """Measures implementations side by side on this machine; prints a table.

    Args:
        tasks: ``["knn"]``, which writes ``knn.json`` and ``knn.png``; or of
            :data:`benchmarks.model.TASKS`, which write ``benchmark.json`` and ``benchmark.png``.
        sizes: numbers of cells.
        out: folder of the files.
        device: torch device.
        implementations: names; all that this machine can run if left out.
        precision: float32, tf32, bfloat16 or float16; neighbour searches are float32.
        **more: of :func:`benchmarks.knn.run` or :func:`benchmarks.model.run`.

    Raises:
        ValueError: one line, if a task, an implementation or the precision is not known.
    """
    if "knn" in tasks:  # imported late: both need torch, which help of the command line does not
        from . import knn

        if len(tasks) > 1 or precision != "float32":
            raise ValueError("the task knn is measured by itself, in float32")
        knn.run(sizes, out, device, implementations=implementations, **more)
    else:
        from . import model

        more |= {"implementations": implementations, "precision": precision}
        model.run(sizes, out, device, tasks=tasks, **more)


def run_commands(sizes, out, device, **more) -> None:
    """Measures whole commands; see :func:`benchmarks.end_to_end.run`."""
    from . import end_to_end

    end_to_end.run(sizes, out, device, **more)


__all__ = ["run", "run_commands"]
