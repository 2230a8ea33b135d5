"""Real pipelines before and after fuse(), with tiny random networks: tests/support/tiny_pipelines.py."""

import concurrent.futures
import contextlib
import copy
import functools
import inspect

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.decoders import StableDiffusion3DecodeStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)

import epskernels
from epskernels import diffusers as fused

from ..support import markdown_examples
from ..support.tiny_pipelines import DEEP, PIPELINES, embeddings, prompts, sd3_parts, unclip
from .test_trajectories import in_float64

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]

# In these diffusers makes the latents of float32, whatever the networks are.
FLOAT32_LATENTS = "PNDMPipeline", "ScoreSdeVePipeline"
# At UnCLIP's first step alpha is 5e-5: diffusers' own images are some 1e-4 from its float64 ones, ours some 1e-6.
OWN_ERROR = {"UnCLIPPipeline": 5e-4}


@functools.cache
def built(name):
    torch.manual_seed(3)
    pipe, call = (PIPELINES | DEEP)[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def schedulers(pipe):
    return {name: part for name, part in vars(pipe).items() if isinstance(part, diffusers.SchedulerMixin)}


def run(pipe, call, seed=5, steps=4):
    method = getattr(pipe, call.get("call", "__call__"))
    call = {key: value for key, value in call.items() if key != "call"}
    if "num_inference_steps" in inspect.signature(method).parameters:
        call["num_inference_steps"] = steps
    torch.manual_seed(seed)  # some pipelines give their scheduler no generator
    output = method(**call, output_type="pt", generator=torch.Generator().manual_seed(seed))
    return torch.as_tensor(next(iter(output.values())))


@contextlib.contextmanager
def all_in_float64(pipe):
    """Within, the networks and the steps of diffusers' schedulers compute in float64, with the noise of float32."""
    draw, before = torch.randn, schedulers(pipe)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]

    def randn(*size, dtype=None, **how):
        return draw(*size, dtype=torch.float32, **how).to(dtype or torch.float32)

    def doubled(scheduler):
        step = scheduler.step

        @functools.wraps(step)
        def step_in_float64(*args, **kwargs):
            with in_float64(scheduler, torch.float32):
                return step(*args, **kwargs)

        scheduler.step = step_in_float64
        return scheduler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        twin = copy.copy(pipe)
        for name, part in vars(pipe).items():  # and of the pipelines in it
            if isinstance(part, diffusers.DiffusionPipeline):
                setattr(twin, name, copy.copy(part))
        for scheduler in before.values():
            double = doubled(copy.deepcopy(scheduler))
            for holder in (twin, *vars(twin).values()):
                for at, part in list(getattr(holder, "__dict__", {}).items()):
                    if part is scheduler:
                        setattr(holder, at, double)
        for network in networks:
            network.double()
        try:
            yield twin
        finally:
            for network in networks:
                network.float()


def exact(name):
    pipe, call = built(name)
    with all_in_float64(pipe) as twin:
        doubles = {
            key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in call.items()
        }
        return run(twin, doubles)


@pytest.mark.parametrize("name", [*PIPELINES, *(pytest.param(name, marks=pytest.mark.deep) for name in DEEP)])
def test_same_images_after_fuse(name):
    """Within 1e-5, 20 ulp of 4 steps and as many calls of networks; and as close to float64 as diffusers, but for 4 ulp."""
    pipe, call = built(name)
    before = schedulers(pipe)
    theirs = run(pipe, call)
    assert fused.fuse(pipe) is pipe
    ours = run(pipe, call)
    after = schedulers(pipe)
    for at, scheduler in after.items():
        theirs_class = type(before[at])
        assert isinstance(scheduler, theirs_class) and type(scheduler).__name__ == theirs_class.__name__
    assert {scheduler.path for scheduler in after.values()} - {None} == {"fused"}
    scaled = run(fused.fuse(pipe, 1.005), call)
    fused.unfuse(pipe)
    assert torch.equal(run(pipe, call), theirs)

    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(1e-5 * size, OWN_ERROR.get(name, 0.0)))
    assert float((scaled - theirs).abs().max()) > 10 * float((ours - theirs).abs().max()) + 5e-5
    if name not in FLOAT32_LATENTS:
        wanted = exact(name)
        errors = [float((images.double() - wanted).abs().max()) for images in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 5e-7 * size, errors


def test_every_scheduler_of_a_pipeline_is_fused():
    """Also those of pipelines in it, which run them; one object stays one."""
    pipe, _ = built("StableCascadeCombinedPipeline")
    fused.fuse(pipe, 1.01)
    assert type(pipe.prior_scheduler) is type(pipe.scheduler) is fused.DDPMWuerstchenScheduler
    assert pipe.prior_pipe.scheduler is pipe.prior_scheduler is not pipe.scheduler is pipe.decoder_pipe.scheduler
    assert pipe.prior_scheduler.eps_scaling == pipe.scheduler.eps_scaling == 1.01
    twin = fused.share(pipe)
    assert twin.prior_pipe.scheduler is twin.prior_scheduler is not pipe.prior_scheduler
    assert twin.prior_prior is pipe.prior_prior and twin.prior_pipe is not pipe.prior_pipe
    fused.unfuse(pipe)
    assert type(pipe.prior_pipe.scheduler) is diffusers.DDPMWuerstchenScheduler is type(pipe.scheduler)
    assert pipe.prior_pipe.scheduler is pipe.prior_scheduler
    with pytest.raises(
        TypeError, match=r"pipe: expected fused schedulers \(fuse\(pipe\) first\), got .*scheduler of DDPMW"
    ):
        fused.share(pipe)


class DenoiseAndDecode(SequentialPipelineBlocks):
    model_name = "stable-diffusion-3"
    block_classes = [StableDiffusion3T2ICoreDenoiseStep(), StableDiffusion3DecodeStep()]
    block_names = ["denoise", "decode"]


def test_modular_pipelines(tmp_path):
    """fuse registers the twin: with the components manager, and in what is saved."""
    torch.manual_seed(3)
    manager = diffusers.ComponentsManager()
    pipe = DenoiseAndDecode().init_pipeline(components_manager=manager, collection="images")
    pipe.update_components(**sd3_parts())
    call = prompts(pooled=embeddings(2, 1, 6)[:, 0], height=8, width=8)

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return pipe(**call, num_inference_steps=4, generator=generator, output_type="pt", output="images")

    theirs = images(pipe)
    assert fused.fuse(pipe) is pipe
    assert manager.get_one(name="scheduler", collection="images") is pipe.scheduler is pipe.components["scheduler"]
    torch.testing.assert_close(images(pipe), theirs, rtol=0, atol=1e-5)
    assert pipe.scheduler.path == "fused"
    scaled = images(fused.fuse(pipe, 1.005))
    assert float((scaled - theirs).abs().max()) > 1e-3
    twin = fused.share(pipe)
    assert torch.equal(images(twin), scaled) and twin.scheduler is not pipe.scheduler
    assert manager.get_one(name="scheduler", collection="images") is pipe.scheduler

    pipe.save_pretrained(str(tmp_path))
    loaded = DenoiseAndDecode().init_pipeline(str(tmp_path))
    loaded.load_components()
    assert type(loaded.scheduler) is fused.FlowMatchEulerDiscreteScheduler
    assert torch.equal(images(loaded), scaled)


@pytest.mark.deep
def test_minimax_h3():
    """Its denoising: a video by `scheduler`, its sound by `audio_scheduler`."""
    torch.manual_seed(3)
    pipe = MiniMaxH3CoreDenoiseStep().init_pipeline()
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=32, hidden_size=16, num_layers=1, num_refiner_layers=1, ffn_dim=16,
        text_dim=8, freq_dim=8, time_embed_hidden_dim=8, time_embed_dim=8, rope_freq_dim=4,
    )  # fmt: skip
    both = {name: diffusers.MiniMaxH3Scheduler() for name in ("scheduler", "audio_scheduler")}
    pipe.update_components(transformer=transformer, **both)
    pipe.set_progress_bar_config(disable=True)
    tags = torch.zeros(5, dtype=torch.long)
    call = {"prompt_embeds": embeddings(batch=1), "text_token_tags": tags, "height": 32, "width": 32, "num_frames": 124}

    def latents():
        state = pipe(**call, num_inference_steps=4, generator=torch.Generator().manual_seed(2))
        return state.get("latents"), state.get("audio_latents")

    theirs, ours = latents(), [fused.fuse(pipe), *latents()][1:]
    assert pipe.scheduler.path == pipe.audio_scheduler.path == "fused" and pipe.scheduler is not pipe.audio_scheduler
    scaled = [fused.fuse(pipe, 1.005), *latents()][1:]
    for a, b, other in zip(ours, theirs, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))
        assert float((other - b).abs().max()) > 1e-2


def test_seeds_are_of_one_scheduler():
    pipe, _ = built("UnCLIPPipeline")
    names = "prior_scheduler, decoder_scheduler, super_res_scheduler"
    with pytest.raises(ValueError, match=rf"seeds: expected None for a pipeline with several schedulers \({names}\)"):
        fused.fuse(pipe, seeds=[1, 2])
    assert type(pipe.prior_scheduler) is diffusers.UnCLIPScheduler


def test_a_pipeline_stays_as_it_was_where_a_scheduler_is_refused():
    torch.manual_seed(3)
    pipe, _ = unclip()
    pipe.super_res_scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=8)
    with pytest.raises(TypeError, match="scheduler: VQDiffusionScheduler chooses tokens"):
        fused.fuse(pipe)
    assert type(pipe.prior_scheduler) is diffusers.UnCLIPScheduler
    for wrong in (torch.nn.Linear(1, 1), None, object()):
        with pytest.raises(
            TypeError, match=f"pipe: expected a pipeline with a scheduler, or a scheduler, got {type(wrong).__name__}"
        ):
            fused.fuse(wrong)


def test_a_fused_pipeline_is_saved_and_loaded(tmp_path):
    network = built("DDIMPipeline")[0].unet
    pipe = fused.fuse(diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()), eps_scaling={"k": 0.001, "b": 1.0})
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is fused.DDPMScheduler and loaded.scheduler.config.eps_scaling == {
        "k": 0.001,
        "b": 1.0,
    }
    call = {"batch_size": 1, "num_inference_steps": 3, "output_type": "np"}
    images = [p(**call, generator=torch.Generator().manual_seed(1)).images for p in (pipe, loaded)]
    torch.testing.assert_close(*(torch.as_tensor(image) for image in images), rtol=0, atol=1e-5)


def test_shared_pipelines_run_at_the_same_time():
    pipe, call = built("StableDiffusionPipeline-UniPCMultistep")
    alone = run(fused.fuse(pipe, 1.01), call)

    def request(twin):
        return twin(**call, output_type="pt", generator=torch.Generator().manual_seed(5), num_inference_steps=4).images

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(request, [fused.share(pipe) for _ in range(3)]))
    for images in results:
        torch.testing.assert_close(images, alone, rtol=0, atol=1e-6)
    fused.unfuse(pipe)


def test_seeds_make_an_image_reproducible():
    """Latents by the same seeds: then nothing is drawn elsewhere, and torch's own generator stays where it was."""
    name, found = "StableDiffusionPipeline-EulerAncestralDiscrete", []
    pipe, call = built(name)
    fused.fuse(pipe, seeds=[7, 8])
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        latents = epskernels.normal(pipe.scheduler.seeds, (4, 8, 8))
        found.append(pipe(**call, latents=latents, output_type="np", num_inference_steps=4).images)
        assert torch.equal(torch.get_rng_state(), state)
    assert (found[0] == found[1]).all()
    fused.unfuse(pipe)


# ---- how serving stacks use schedulers: docs/stacks.md ----


def trajectory(scheduler, steps=None):
    if steps is not None:
        scheduler.set_timesteps(steps)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x, return_dict=False)[0]
    return x


def test_classes_in_the_place_of_diffusers_own(monkeypatch, tmp_path):
    """InvokeAI, vLLM-Omni: a class is imported, compared by `is`, and made from a configuration with keys of the stack's own."""
    plain, _ = built("StableDiffusionPipeline-PNDM")
    plain.save_pretrained(tmp_path)
    for theirs, twin in fused.FUSED.items():
        for module in (diffusers, diffusers.schedulers):
            monkeypatch.setattr(module, theirs.__name__, twin, raising=False)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    assert type(pipe.scheduler) is fused.PNDMScheduler is diffusers.PNDMScheduler is diffusers.schedulers.PNDMScheduler
    config = {**pipe.scheduler.config, "use_karras_sigmas": True, "cpu_only": True, "_backup": pipe.scheduler.config}
    made = [diffusers.UniPCMultistepScheduler.from_config({**config, **more}) for more in ({}, {"eps_scaling": 1.01})]
    assert made[0].eps_scaling == 1 and made[1].eps_scaling == 1.01
    images = [trajectory(scheduler, 5) for scheduler in (type(made[0])._theirs.from_config(config), *made)]
    torch.testing.assert_close(images[1], images[0], rtol=1e-6, atol=1e-5)
    assert made[0].path == made[1].path == "fused" and float((images[2] - images[0]).abs().max()) > 1e-2


class Wrapper:
    """As xDiT wraps a scheduler: what is read and set goes to it, if it has it."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __setattr__(self, name, value):
        of = self.module if name != "module" and hasattr(self.module, name) else super()
        of.__setattr__(name, value)


def test_a_wrapped_scheduler():
    scheduler = fused.UniPCMultistepScheduler()
    wrapper = Wrapper(scheduler)
    alone = trajectory(fused.UniPCMultistepScheduler(), 5)
    assert torch.equal(trajectory(wrapper, 5), alone) and wrapper.path == "fused"
    wrapper._step_index = None
    assert scheduler.step_index is None
    pipe = copy.copy(built("StableDiffusionPipeline")[0])
    pipe.scheduler = Wrapper(diffusers.DDIMScheduler())
    expected = "whose scheduler is a Wrapper, not one of diffusers' SchedulerMixin"
    with pytest.raises(TypeError, match=rf"^pipe: expected .*, got StableDiffusionPipeline, {expected}$"):
        fused.fuse(pipe)


class Holder:
    """Holds a pipeline, and hands its scheduler on; or has it by a property."""

    def __init__(self, **held):
        self.__dict__.update(held)

    @property
    def scheduler(self):
        return self._scheduler if "_scheduler" in self.__dict__ else self.pipe.scheduler


def test_what_hands_a_scheduler_on():
    pipe = copy.copy(built("StableDiffusionPipeline")[0])
    for holder in (Holder(pipe=pipe), Holder(_scheduler=diffusers.DDIMScheduler())):
        assert fused.fuse(holder, 1.01) is holder
        assert type(holder.scheduler) is fused.DDIMScheduler and holder.scheduler.eps_scaling == 1.01
        twin = fused.share(holder)
        assert type(twin.scheduler) is fused.DDIMScheduler and twin.scheduler is not holder.scheduler
        assert type(fused.unfuse(holder).scheduler) is diffusers.DDIMScheduler
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and type(twin.scheduler) is fused.DDIMScheduler
    slots = type("Slots", (), {"__slots__": ["scheduler"]})()
    slots.scheduler = diffusers.DDIMScheduler()
    assert type(fused.fuse(slots).scheduler) is fused.DDIMScheduler


@pytest.mark.parametrize("copied", [lambda s: s, copy.copy, copy.deepcopy], ids=["same", "copy", "deepcopy"])
@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverMultistep", "DEISMultistep", "EulerDiscrete"])
def test_a_scheduler_that_is_reset_by_its_attributes(name, copied):
    """SGLang, vLLM-Omni: set_timesteps once, or in a template of which each request has a copy; then as new, by attributes."""
    template = getattr(fused, f"{name}Scheduler")(num_train_timesteps=100)
    first = trajectory(template, 5)
    scheduler = copied(template)
    scheduler._step_index = scheduler._begin_index = None
    for attribute, value in {"lower_order_nums": 0, "last_sample": None, "this_order": 0}.items():
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, value)
    for attribute in ("model_outputs", "timestep_list"):
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, [None] * scheduler.config.solver_order)
    scheduler.set_begin_index(0)
    assert torch.equal(trajectory(scheduler), first) and scheduler.path == "fused"


def test_examples_of_the_page_of_stacks(tmp_path):
    names = markdown_examples.run("docs/stacks.md", tmp_path)
    assert type(names["scheduler"]) is fused.UniPCMultistepScheduler
    assert diffusers.UniPCMultistepScheduler in fused.FUSED  # and diffusers has its own back
