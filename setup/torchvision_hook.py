"""Let `import torchvision` succeed where its native library cannot load.

Symptom: beside a CPU build of torch, torchvision's CUDA wheel stops with `operator torchvision::nms
does not exist`. vLLM and transformers import torchvision before any vLLM plugin is loaded, so a
repair in a plugin comes too late.

Mechanism: torchvision shrugs off the missing native library in `torchvision.extension`, then its
`_meta_registrations` attaches shape functions to `nms` and `qnms` whether they exist or not. So the
two schemas are declared just before that module runs. Nothing here computes them: calling one still
fails, with torch's own message. What is pure torch (`transforms.v2`) works.

The installer copies this file into the virtual environment beside a `.pth` file that calls
`install()` in every process, workers included. It therefore must not import torch.

Remove when: torchvision can be had from PyTorch's CPU wheel index wherever this runs.
"""

import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
MISSING_OPERATORS = ("nms", "qnms")
HOOKED_MODULE = "torchvision._meta_registrations"


class MissingOperators:
    """A meta-path finder that finds nothing: it only acts when the hooked module is asked for."""

    library: object = None  # torch forgets the schemas when their Library is collected

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Declare the schemas on the way to `HOOKED_MODULE`; always leave finding to others."""
        if name == HOOKED_MODULE and cls.library is None:
            cls.declare()

    @classmethod
    def declare(cls) -> None:
        """Declare the schemas, unless torchvision's own library brought the operators."""
        if sys.modules["torchvision.extension"]._has_ops():
            return
        import torch

        cls.library = library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in MISSING_OPERATORS:
            library.define(operator + SCHEMA)


def install() -> None:
    """Put the finder first on the import path, once."""
    if MissingOperators not in sys.meta_path:
        sys.meta_path.insert(0, MissingOperators)
