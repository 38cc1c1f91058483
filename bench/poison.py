"""An engine that a certain text kills, as a fault in a kernel would: while it works on it."""

from __future__ import annotations

import asyncio
import os
import signal

from bench.process_tree import descendants
from serving.engine import VllmEngine
from serving.protocol import Generated, Generation

PHRASE = "drill: stop this engine"


class PoisonableEngine(VllmEngine):
    """`VllmEngine`, whose worker dies of SIGSEGV while it decodes a prompt with `PHRASE`."""

    async def generate(self, request: Generation) -> Generated:
        """Decodes one answer, or dies of it."""
        prompt = self._llm.get_tokenizer().decode(
            [token_id for token_id in request.prompt_ids if token_id < self.info.vocab_size]
        )
        if PHRASE in prompt:
            core = self._processes[0].pid
            worker = [core, *descendants(core)][-1]
            asyncio.get_running_loop().call_later(0.003, os.kill, worker, signal.SIGSEGV)
        return await super().generate(request)
