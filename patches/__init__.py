"""The vLLM plugin: a LLaVA-1.5 whose requests pay only for the visual tokens they keep.

vLLM calls `register` (entry point group `vllm.general_plugins`) in every process it starts, some
of them twice. The architecture is chosen per engine through `hf_overrides`; stock LLaVA stays
registered under its own name and is the control in tests and benchmarks.
"""

from patches.config import ARCHITECTURE


def register() -> None:
    """Registers the architecture, exact decoding and repairs; may be called any number of times."""
    from vllm import ModelRegistry

    from patches import canonical, repairs

    ModelRegistry.register_model(ARCHITECTURE, "patches.model:SieveLlavaForConditionalGeneration")
    canonical.install()
    repairs.apply()
