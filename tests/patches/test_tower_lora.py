"""Adapters on the vision tower and the projector, in the plugin (the server refuses them yet)."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import serving.engine
from patches.config import Retention
from serving.catalogue import Choices
from serving.prompts import encode, render_prompt
from serving.protocol import Adapter, LoraRoom
from tests.checkpoints import build_adapter
from tests.pictures import noise
from tests.running import RunningServer
from train.reference import Reference

pytestmark = pytest.mark.long
TOWER = Adapter(name="tower", path="", rank=8)
TARGETS = (
    r".*(language_model.*\.(q_proj|v_proj)|vision_tower.*layers\.[01]\.self_attn\.(q_proj|k_proj)"
    r"|vision_tower.*layers\.[01]\.mlp\.fc1|multi_modal_projector\.linear_\d)"
)


@pytest.fixture(scope="module")
def adapter(published, tmp_path_factory):
    """The adapter as PEFT saved it, and as vLLM's module names want it."""
    peft = tmp_path_factory.mktemp("tower") / "peft"
    build_adapter(published, peft, seed=3, scale=0.2, target_modules=TARGETS)
    ours = shutil.copytree(peft, peft.parent / "vllm")
    weights = load_file(peft / "adapter_model.safetensors")
    renamed = {
        key.replace("vision_tower.encoder", "vision_tower.vision_model.encoder"): value
        for key, value in weights.items()
    }
    assert any("multi_modal_projector" in key for key in renamed)
    assert any("vision_tower.vision_model" in key for key in renamed)
    save_file(renamed, ours / "adapter_model.safetensors")
    return peft, ours


class TowerLoraServer(RunningServer):
    def __init__(self, adapter, **settings):
        super().__init__(**settings)
        self._adapter = adapter

    async def _start(self):
        await super()._start()
        adapters = self.labeler.engine.adapters
        await adapters._slots.load(TOWER, str(self._adapter), 1)
        adapters._numbers[TOWER.key], adapters._adapters[TOWER.key] = 1, TOWER


@pytest.fixture(scope="module")
def server(adapter, published):
    upstream = serving.engine.engine_args

    def with_tower_lora(settings, room):
        room = LoraRoom(max_rank=8, max_loras=1, max_cpu_loras=8, has_projector=True)
        return upstream(settings, room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.engine, "engine_args", with_tower_lora)
        server = TowerLoraServer(
            adapter[1], model=str(published), dtype="float32", max_model_len=2600
        )
        with server:
            yield server


@pytest.mark.parametrize("ratio", [1.0, 0.4, 0.05])
@pytest.mark.parametrize("tuned", [False, True])
def test_an_adapter_on_tower_and_projector_equals_the_reference(
    server, adapter, published, ratio, tuned
):
    labeler, images = server.labeler, [noise(1), noise(2, (90, 140))]
    constraint = labeler.constraints["sentiment"]
    prompt = encode(
        labeler.tokenizer, render_prompt(labeler.tokenizer, constraint.structure, "x", len(images))
    )
    reference = Reference(published, adapter[0] if tuned else None)
    answer = constraint.answer_ids({"sentiment": "positive"})
    scored = reference.score(images, prompt, answer, ratio=ratio)
    row = scored.logprobs[0, [ids[0] for ids in constraint.fields[0].segments.values()]].softmax(-1)
    generated = server.call(
        labeler.engine.generate(_generation(labeler, prompt, images, ratio, tuned))
    )
    found = [generated.logprobs[0][ids[0]] for ids in constraint.fields[0].segments.values()]
    assert found == pytest.approx(row.log().tolist(), abs=1e-3)


def _generation(labeler, prompt, images, ratio, tuned):
    from serving.protocol import Generation

    constraint = labeler.constraints["sentiment"]
    return Generation(
        request_id=f"{ratio}-{tuned}",
        prompt_ids=prompt,
        images=images,
        adapter=TOWER if tuned else None,
        retention=Retention(ratio=ratio),
        pattern=constraint.pattern,
        max_tokens=1,
        num_logprobs=constraint.num_logprobs,
    )


def test_without_adapters_choices_resolve_to_the_base(server):
    assert server.labeler.catalogue.resolve(Choices()).adapter is None
