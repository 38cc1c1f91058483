"""The model as a worker loads it, in a process of its own: what its tower cache does to its rows.

Prints a JSON object a step: how many images went through the tower, how far rows are from those
without the cache.
"""

import json
import sys

import torch
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.network_utils import get_open_port
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

import patches
from patches.config import Retention, SieveConfig
from patches.selection import SELECTORS
from tests.pictures import noise

RATIOS = (0.2, 1.0, 0.6, 0.05)
FIELDS = ("pixel_values", "num_kept", "selector", "seed", "pixels_key")


def load(folder: str) -> tuple:
    patches.register()
    _set_torch_accelerator_to_noop()
    overrides = SieveConfig().hf_overrides()
    model_config = ModelConfig(
        model=folder, dtype="float32", max_model_len=1024, hf_overrides=overrides
    )
    config = VllmConfig(model_config=model_config, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        return config, get_model(vllm_config=config)


def main(folder: str) -> None:
    config, model = load(folder)
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    strangers = iter(range(1_000_000))

    def embed(images, retention, *, is_known):
        seen = processor.look_at(images, retention)
        kwargs = {name: seen[name] for name in FIELDS}
        if not is_known:
            keys = [[next(strangers), -1] for _ in images]
            kwargs["pixels_key"] = torch.tensor(keys)
        before = model.cls_tower.num_images
        context = set_current_vllm_config(config), set_forward_context(None, config)
        with torch.inference_mode(), context[0], context[1]:
            rows = model.embed_multimodal(**kwargs)
        return rows, model.cls_tower.num_images - before

    images = [noise(seed, (120, 90)) for seed in range(5)]
    for turn, (ratio, selector) in enumerate((r, s) for r in RATIOS for s in SELECTORS):
        asked = [images[(turn + offset) % 5] for offset in range(3)]
        retention = Retention(ratio=ratio, selector=selector)
        rows, num_run = embed(asked, retention, is_known=True)
        alone, num_alone = embed(asked, retention, is_known=False)
        worst = max(float((a - b).abs().max()) for a, b in zip(rows, alone, strict=True))
        found = {"ratio": ratio, "selector": selector, "run": num_run, "alone": num_alone}
        print(json.dumps({**found, "kept": [len(row) for row in rows], "worst": worst}))


if __name__ == "__main__":
    main(sys.argv[1])
