"""ComfyUI's own server over tiny models: `python comfyui_server.py CHECKOUT FOLDER PORT`.

FOLDER: ComfyUI's base directory, with custom_nodes. What ComfyUI imports and a sampler does not need (torchvision, torchaudio,
a frontend, ...) is stood in for where it is not installed. As a file in custom_nodes it is the node "Tiny", which gives models
with few and random weights, and the output node "Keep", which writes a latent.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import pathlib
import runpy
import sys
from unittest.mock import MagicMock

NOT_NEEDED = (
    "alembic", "av", "comfy_kitchen", "kornia", "sentencepiece", "spandrel", "sqlalchemy", "torchaudio", "torchvision",
)  # fmt: skip


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, as a mock, what is asked for and is not installed."""

    def __init__(self):
        self.missing = {name for name in NOT_NEEDED if importlib.util.find_spec(name) is None}

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def serve(checkout, folder, port):
    sys.meta_path.append(StandIn())
    page = pathlib.Path(folder) / "page"
    page.mkdir(exist_ok=True)
    (page / "index.html").write_text("")
    sys.argv = [
        "main.py", "--cpu", "--base-directory", folder, "--front-end-root", str(page), "--port", port,
        "--disable-api-nodes", "--disable-metadata", "--preview-method", "none", "--database-url", "sqlite:///:memory:",
    ]  # fmt: skip
    os.chdir(checkout)
    sys.path.insert(0, checkout)
    runpy.run_path("main.py", run_name="__main__")


if __name__ == "__main__":
    serve(*sys.argv[1:])


# ---- the nodes ----


def tiny(kind):
    """(ModelPatcher, channels) of a model of ComfyUI's with few weights, which are random."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    if kind == "sd15":
        config = comfy.supported_models.SD15(
            dict(
                image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1, 1], channel_mult=[1, 2],
                transformer_depth=[1, 0], transformer_depth_output=[1, 1, 0, 0], transformer_depth_middle=1, num_heads=4,
                use_spatial_transformer=True, context_dim=16, legacy=False, dtype=torch.float32, use_temporal_attention=False,
            )
        )  # fmt: skip
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS)
    else:
        config = comfy.supported_models.AuraFlow(
            dict(
                cond_seq_dim=16, n_double_layers=1, n_layers=2, dim=64, n_heads=2, max_seq=256, dtype=torch.float32,
            )
        )  # fmt: skip
        model = comfy.model_base.AuraFlow(config)
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        if weights.numel():
            by = 0.3 / max(1, weights[0].numel()) ** 0.5 if weights.dim() > 1 else 0.1
            weights.data = torch.randn(weights.shape, generator=generator) * by
    model.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class Tiny:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CONDITIONING", "CONDITIONING"), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["sd15", "aura"],)}}

    def make(self, kind):
        import torch

        generator = torch.Generator().manual_seed(7)
        text = [torch.randn(1, 5, 16, generator=generator) for _ in range(2)]
        return tiny(kind), *([[each, {"pooled_output": each[:, 0]}]] for each in text)


class Keep:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "write", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "path": ("STRING", {"default": ""})}}

    def write(self, latent, path):
        import numpy

        numpy.save(path, latent["samples"].numpy())
        return {}


NODE_CLASS_MAPPINGS = {"Tiny": Tiny, "Keep": Keep}
