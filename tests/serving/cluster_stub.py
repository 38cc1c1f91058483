"""The shape of the real application without models: an ingress and engines that only wait."""

import asyncio
import time

import ray
from ray import serve


class Engine:
    def __init__(self, model):
        time.sleep(5)  # as if it loaded weights
        self.model = model

    async def answer(self, seconds):
        await asyncio.sleep(seconds)
        return {"model": self.model, "node": ray.get_runtime_context().get_node_id()}


class Ingress:
    def __init__(self, engine):
        self.engine = engine

    async def __call__(self, request):
        return await self.engine.answer.remote(float(request.query_params["seconds"]))


def app(args):
    """Takes the arguments of serving/serve.yaml."""
    least, most = map(int, args["replicas"].split("-"))
    engine = serve.deployment(
        Engine,
        max_ongoing_requests=4,
        graceful_shutdown_timeout_s=20,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": args["replica_cpus"], "num_gpus": args["replica_gpus"]},
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": 2,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 3,
            "downscale_to_zero_delay_s": 3,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1,
        },
    )
    ingress = serve.deployment(Ingress, max_ongoing_requests=100)
    return ingress.bind(engine.bind(args["model"]))
