"""Shards on a Ray cluster, through Ray Data: as many actors as asked for, each with the models, a shard at a time.

The folder of the shards and OUT must be the same on all machines. An actor that dies is started again and its shard
with it; what was done stays done. The bytes are those of one process: an actor computes with as many threads, where Ray
would give it one.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from openblip2.capfilt.duplicates import Twin
from openblip2.capfilt.how import How
from openblip2.capfilt.models import Models, open_models
from openblip2.capfilt.shard import Made, Maker, Task
from openblip2.errors import UserError


class Worker:
    """An actor of Ray Data. It loads the models when its first shard comes, so that what they raise comes back."""

    def __init__(self, models: Models, how: How, threads: int) -> None:
        self.models, self.how, self.threads = models, how, threads
        self.maker: Maker | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        """A batch of one task in, what came of it out, as JSON; {"error": ...} where nothing can come of the rest."""
        try:
            torch.set_num_threads(self.threads)
            if self.maker is None:
                self.maker = Maker(*open_models(self.models, self.how), self.how)
            made = [self.maker(_task(row))._asdict() for row in rows["task"]]
        except UserError as error:
            made = [{"error": str(error)}]
        return {"made": [json.dumps(one) for one in made]}


def on_ray(tasks: Iterable[Task], models: Models, how: How, workers: int) -> Iterator[Made]:
    """Makes shards on the cluster that RAY_ADDRESS names, or on this machine alone; as they are done, in any order.

    Raises:
        UserError: Ray is missing, the cluster has no room for the workers, or what they raise.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]  (not among what the developers install)
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--ray needs Ray Data: pip install 'openblip2[ray]'") from error
    began = not ray.is_initialized()
    if began:
        _start(ray, workers)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # how its own plan goes: ours is said by us
        gpus = ray.cluster_resources().get("GPU", 0)
        options: dict[str, Any] = {"num_gpus": min(1, gpus / workers)} if gpus else {"num_cpus": _share(ray, workers)}
        rows = [{"task": json.dumps(task)} for task in tasks]
        given = ray.data.from_items(rows, override_num_blocks=len(rows))
        made = given.map_batches(
            Worker,
            fn_constructor_args=(models, how, torch.get_num_threads()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            **options,
        )
        for row in made.iter_rows():
            found = json.loads(row["made"])
            if "error" in found:
                raise UserError(found["error"])
            yield Made(**found)
    finally:
        if began:
            ray.shutdown()


def _start(ray: Any, workers: int) -> None:
    """Joins the cluster that the environment names, or starts Ray here with more CPUs than the workers take."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"num_cpus": max(os.cpu_count() or 1, workers + 1), "include_dashboard": False}
    ray.init(**options)


def _share(ray: Any, workers: int) -> float:
    """CPUs that a worker reserves: one, or less where that would leave none to those who read for them.

    Without a CPU Ray Data's own tasks wait for ever, and say nothing.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    return 1 if cpus >= workers + 1 else max(cpus - 1, 0.5) / workers


def _task(row: str) -> Task:
    task = Task(*json.loads(row))
    return task._replace(twins=[Twin(*twin) for twin in task.twins])
