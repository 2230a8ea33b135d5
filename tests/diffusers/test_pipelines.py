"""Real pipelines before and after fuse(): small, with random weights, but for the bundled model; nothing is downloaded."""

import concurrent.futures
import functools

import diffusers
import pytest
import torch

import epskernels
from epskernels import diffusers as fused
from epskernels import models

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]


def vae(**more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        **more,
    )  # fmt: skip


def unet(**more):
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, **more,
    )  # fmt: skip


def embeddings(batch=2, words=5, width=8, seed=1):
    return torch.randn(batch, words, width, generator=torch.Generator().manual_seed(seed))


# Each: (the pipeline, what it is called with beside generator and number of steps).


def ddpm():
    return diffusers.DDPMPipeline.from_pretrained(models.DIGITS), {"batch_size": 2}


def ddim():
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()), {"batch_size": 2, "eta": 0.5}


VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def stable_diffusion(scheduler=diffusers.DDIMScheduler, **config):
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(), scheduler=scheduler(**{**VP, **config}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipe, {"prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=2), "guidance_scale": 3.0}


def stable_diffusion_xl():
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 30,
    }
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet(**added),
        scheduler=diffusers.EulerDiscreteScheduler(**VP), add_watermarker=False,
    )  # fmt: skip
    pooled = embeddings(2, 1, 6)[:, 0]
    return pipe, {
        "prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=2), "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": -pooled, "guidance_scale": 3.0,
    }  # fmt: skip


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.DiTPipeline(transformer, vae(), diffusers.DDPMScheduler(clip_sample=False)), {
        "class_labels": [1, 207]
    }


def stable_diffusion_3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=6, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pooled = embeddings(2, 1, 6)[:, 0]
    return pipe, {
        "prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=2), "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": -pooled, "guidance_scale": 3.0, "height": 8, "width": 8,
    }  # fmt: skip


def wan():
    """A video, by UniPC on flow sigmas."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, num_train_timesteps=1000
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=autoencoder, scheduler=scheduler
    )
    return pipe, {
        "prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=2), "guidance_scale": 3.0, "height": 16,
        "width": 16, "num_frames": 5,
    }  # fmt: skip


PIPELINES = {
    "DDPMPipeline": ddpm,
    "DDIMPipeline": ddim,
    "StableDiffusionPipeline": stable_diffusion,
    **{
        f"StableDiffusionPipeline-{name}": functools.partial(stable_diffusion, getattr(diffusers, f"{name}Scheduler"), **more)
        for name, more in {
            "DDPM": {}, "EulerAncestralDiscrete": {}, "DPMSolverMultistep": {"algorithm_type": "sde-dpmsolver++"},
            "HeunDiscrete": {}, "LCM": {}, "UniPCMultistep": {},
        }.items()
    },
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "DiTPipeline": dit,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "WanPipeline": wan,
}  # fmt: skip


@functools.cache
def built(name):
    torch.manual_seed(3)
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def run(name, scheduler, seed=5, steps=4):
    pipe, call = built(name)
    pipe.scheduler = scheduler
    kind = {"output_type": "np"}
    torch.manual_seed(seed)  # some pipelines give their scheduler no generator
    generator = torch.Generator().manual_seed(seed)
    output = pipe(**call, **kind, generator=generator, num_inference_steps=steps)
    return pipe, torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


@pytest.mark.parametrize("name", PIPELINES)
def test_same_images_after_fuse(name):
    before = built(name)[0].scheduler
    theirs = run(name, before)[1]
    pipe, _ = run(name, before)
    assert fused.fuse(pipe) is pipe
    assert isinstance(pipe.scheduler, type(before)) and type(pipe.scheduler).__name__ == type(before).__name__
    ours = run(name, pipe.scheduler)[1]
    assert pipe.scheduler.path == "fused"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    scaled = run(name, fused.fused(before, 1.02))[1]
    assert float((scaled - theirs).abs().max()) > 1e-4
    pipe.scheduler = before


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
    before = built("StableDiffusionPipeline-UniPCMultistep")[0].scheduler
    pipe, alone = run("StableDiffusionPipeline-UniPCMultistep", fused.fused(before, 1.01))
    _, call = built("StableDiffusionPipeline-UniPCMultistep")
    pipe.scheduler.set_timesteps(4)

    def request(twin):
        twin.set_progress_bar_config(disable=True)
        return twin(**call, output_type="np", generator=torch.Generator().manual_seed(5), num_inference_steps=4).images

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(request, [fused.share(pipe) for _ in range(3)]))
    for images in results:
        torch.testing.assert_close(torch.as_tensor(images), alone, rtol=0, atol=1e-6)
    pipe.scheduler = before


def test_seeds_make_an_image_reproducible():
    """Latents by the same seeds: then nothing is drawn elsewhere, and torch's own generator stays where it was."""
    name, found = "StableDiffusionPipeline-EulerAncestralDiscrete", []
    pipe, call = built(name)
    before = pipe.scheduler
    fused.fuse(pipe, seeds=[7, 8])
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        latents = epskernels.normal(pipe.scheduler.seeds, (4, 8, 8))
        found.append(pipe(**call, latents=latents, output_type="np", num_inference_steps=4).images)
        assert torch.equal(torch.get_rng_state(), state)
    assert (found[0] == found[1]).all()
    pipe.scheduler = before
