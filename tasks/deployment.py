"""Register, deploy and try the model: tasks around `ml.registry` and `ml.deployment`."""

import getpass
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx

from ml.artifacts import Decision, Deployment, Evaluation, RawDataset, SplitDataset, Variant
from ml.bundles import read_bundle, schema_digest
from ml.deployment import ask, deploy
from ml.evaluation.held_out import held_out_replies
from ml.evaluation.quality import scores_from_frame
from ml.outcome import Sample
from ml.registry import ModelVersion, Registry, version_id
from ml.runs import Run
from ml.settings import load_settings
from ml.solution import load_solution
from ml.storage.connect import open_artifact_store
from tasks.bundle_folders import bundle_folders
from tasks.options import stage_task

NUM_SAMPLES = 3


@stage_task()
def deploy_model(
    run: Run, decision: Decision, variants: Sequence[Variant], test: Sequence[Evaluation], raw: RawDataset, splits: SplitDataset
) -> Deployment:
    """Write the version, ask it in isolation, move the champion alias, and ask it again through the predictor."""
    store, config = open_artifact_store(), run.config
    spec = load_solution(config.solution)
    bundle = next(variant.require_bundle() for variant in variants if variant.name == decision.variant)
    quality = next(evaluation.quality for evaluation in test if evaluation.variant == decision.variant)
    with bundle_folders(store, {config.name: bundle}) as folders:
        folder = folders[config.name]
        offline = scores_from_frame(store.get_frame(quality.scores))
        held_out = held_out_replies(folder, spec, store.get_frame(splits.test), offline, config.deploy.smoke_rows)
        described = read_bundle(folder)
        created = datetime.now(UTC)
        version = ModelVersion(
            name=config.name,
            version=version_id(created, bundle),
            solution=config.solution,
            bundle=bundle,
            schema_digest=schema_digest(described),
            options=described.options,
            run_id=run.run_id,
            data={name: ref.sha256 for name, ref in raw.objects.items()},
            metrics={name: interval.value for name, interval in quality.metrics.items()},
            created=created,
            provenance=described.provenance,
        )
        return deploy(
            Registry(store),
            version,
            folder,
            held_out,
            predictor_url=load_settings().predictor_url,
            who=getpass.getuser(),
            why=f"run {run.run_id} chose {decision.variant}",
        )


@stage_task()
def ask_samples(run: Run, deployment: Deployment, splits: SplitDataset) -> tuple[Sample, ...]:
    """Ask the served model what a newcomer would ask it: the solution's samples, or some held-out rows of the user's own data."""
    url, spec = load_settings().predictor_url, load_solution(run.config.solution)
    if url is None or deployment.status not in ("deployed", "unchanged"):
        return ()
    is_demo = run.config.data.source.startswith("package:")
    requests = spec.sample_requests if is_demo else spec.requests(open_artifact_store().get_frame(splits.test).head(NUM_SAMPLES))
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        replies = list(ask(client, deployment.name, requests))
    return tuple(Sample(request=request, reply=reply) for request, reply in zip(requests, replies, strict=True))
