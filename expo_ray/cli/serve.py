"""`expo-ray serve`: serve a job's pairs and models until it is interrupted."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
from collections.abc import Collection

from expo_ray.cli.exit_status import FAILED
from expo_ray.cli.extras import require
from expo_ray.config import Job, format_alpha, load_job
from expo_ray.evaluation.responses.check_served import check_served
from expo_ray.interrupt import begin_clean_up
from expo_ray.serving.engine_checks import check_engine
from expo_ray.serving.served_models import plan_served_pairs


def command(arguments: argparse.Namespace) -> int:
    """Run `expo-ray serve`; the exit status is 0 once it has served and is interrupted, 1 if a model could not be served."""
    require("ray")
    job = load_job(arguments.job)
    settings = (
        job.serving if arguments.port is None else job.serving.model_copy(update={"port": arguments.port})
    )
    plans = plan_served_pairs(job)
    check_served(plans, job.models, settings)
    check_engine(settings, plans)
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.serving.serve_models import serving

    with cluster(job.places("pairs", "models")), serving(plans, job.models, settings) as endpoint:
        print(_welcome(job, endpoint.url, endpoint.failures), flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:  # SIGTERM as well
            begin_clean_up()
            print("stopping", flush=True)
    return FAILED if endpoint.failures else 0


def _welcome(job: Job, url: str, failures: Collection[str]) -> str:
    served = [pair for pair in job.pairs if pair.name not in failures]
    names = [f"{pair.name}@{format_alpha(alpha)}" for pair in served for alpha in pair.alphas or (0.0,)]
    names += [model.name for model in job.models if model.name not in failures]
    pairs = [f"{pair.name}@ALPHA" for pair in served]
    body = {"model": names[0], "messages": [{"role": "user", "content": "Hello"}]}
    lines = [
        f"serving at {url}/v1: {', '.join(names)}",
        *([f"and every other alpha, as {', '.join(pairs)}"] if pairs else []),
        "",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
        "",
        "Ctrl-C ends it",
    ]
    return "\n".join(lines)
