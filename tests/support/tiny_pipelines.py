"""diffusers' pipelines with tiny random networks: nothing is downloaded, but for the bundled model nothing is trained.

PIPELINES and DEEP: by name, functions of no argument to (the pipeline, what it is called with beside generator and steps).
"""

import functools
import inspect

import diffusers
import torch
import transformers
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.utils import is_torchsde_available

from epskernels import models

# ---- networks ----


def unet_2d(**more):
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
    }
    return diffusers.UNet2DModel(
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **{**settings, **more},
    )


def unet(**more):
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, **more,
    )  # fmt: skip


def cascade_unet(channels, heads, levels, **more):
    ones = (1,) * levels
    return StableCascadeUNet(
        conditioning_dim=8, block_out_channels=channels, num_attention_heads=heads, down_num_layers_per_block=ones,
        up_num_layers_per_block=ones, clip_text_pooled_in_channels=8, dropout=(0.0,) * levels, **more,
    )  # fmt: skip


def vae(**more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        **more,
    )  # fmt: skip


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def of_wan(network, **more):
    return network(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=1, **more,
    )  # fmt: skip


# ---- prompts ----

NO_TEXT = {"tokenizer": None, "text_encoder": None}  # the prompts come as embeddings


class Tokenizer:
    """A letter is a token."""

    model_max_length = 6

    def __call__(self, text, **_):
        texts = [text] if isinstance(text, str) else text
        ids = torch.tensor([[ord(letter) % 16 for letter in each.ljust(6)[:6]] for each in texts])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def t5():
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def clip():
    config = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config).eval()


def embeddings(batch=2, words=5, width=8, seed=1):
    return torch.randn(batch, words, width, generator=torch.Generator().manual_seed(seed))


def prompts(mask=None, pooled=None, **more):
    call = {"prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=2), **more}
    if mask is not None:
        call |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    if pooled is not None:
        call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    return call


# ---- images without a prompt ----


def ddpm():
    return diffusers.DDPMPipeline.from_pretrained(models.DIGITS), {"batch_size": 2}


def ddim():
    network = unet_2d(in_channels=1, out_channels=1)
    return diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()), {"batch_size": 2, "eta": 0.5}


def pndm():
    return diffusers.PNDMPipeline(unet_2d(), diffusers.PNDMScheduler()), {"batch_size": 2}


def score_sde_ve():
    scheduler = diffusers.ScoreSdeVeScheduler(
        sigma_max=2.0, snr=0.05
    )  # with its default the images are black and white
    return diffusers.ScoreSdeVePipeline(unet_2d(), scheduler), {"batch_size": 2}


def consistency():
    pipe = diffusers.ConsistencyModelPipeline(unet_2d(num_class_embeds=4), diffusers.CMStochasticIterativeScheduler())
    return pipe, {"batch_size": 2, "class_labels": [0, 1]}


def repaint():
    mask = torch.ones(2, 1, 8, 8)
    mask[..., :4] = 0
    call = {"image": torch.rand(2, 3, 8, 8), "mask_image": mask, "jump_length": 2, "jump_n_sample": 2, "eta": 0.5}
    return diffusers.RePaintPipeline(unet_2d(), diffusers.RePaintScheduler()), call


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, vae(), diffusers.DDPMScheduler(clip_sample=False))
    return pipe, {"class_labels": [1, 207]}


# ---- images of a prompt ----

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def stable_diffusion(scheduler="DDIM", kind=diffusers.StableDiffusionPipeline, parts=None, **config):
    scheduler = getattr(diffusers, f"{scheduler}Scheduler")
    taken = inspect.signature(scheduler).parameters
    config = {key: value for key, value in VP.items() if key in taken} | config
    pipe = kind(
        vae=vae(), **NO_TEXT, unet=unet(), scheduler=scheduler(**config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts or {},
    )  # fmt: skip
    return pipe, prompts(guidance_scale=3.0)


def diffedit():
    """Its inversion, of another scheduler than `scheduler`."""
    inverse = {"inverse_scheduler": diffusers.DDIMInverseScheduler(**VP)}
    pipe, call = stable_diffusion(kind=diffusers.StableDiffusionDiffEditPipeline, parts=inverse)
    return pipe, call | {
        "call": "invert",
        "image": torch.rand(2, 3, 8, 8),
        "inpaint_strength": 1.0,
        "decode_latents": True,
    }


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
    return pipe, prompts(pooled=embeddings(2, 1, 6)[:, 0], guidance_scale=3.0)


def sd3_parts():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=6, out_channels=4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": transformer, "scheduler": scheduler, "vae": vae(shift_factor=0.1)}


def stable_diffusion_3():
    pipe = diffusers.StableDiffusion3Pipeline(
        **sd3_parts(), **NO_TEXT, tokenizer_2=None, text_encoder_2=None, tokenizer_3=None, text_encoder_3=None
    )
    return pipe, prompts(pooled=embeddings(2, 1, 6)[:, 0], guidance_scale=3.0, height=8, width=8)


def stable_cascade():
    """A pipeline of two pipelines, of which each has its scheduler."""
    decoder = cascade_unet(
        (8, 16), (-1, 2), 2, in_channels=4, out_channels=4, effnet_in_channels=16,
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
    )  # fmt: skip
    prior = cascade_unet((8, 8), (2, 2), 2, switch_level=(False,), clip_text_in_channels=8, clip_image_in_channels=8)
    pipe = diffusers.StableCascadeCombinedPipeline(
        tokenizer=None, text_encoder=clip(), decoder=decoder, scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8), prior_prior=prior,
        prior_text_encoder=clip(), prior_tokenizer=None, prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip
    pooled = {"prompt_embeds_pooled": embeddings(words=1), "negative_prompt_embeds_pooled": embeddings(words=1, seed=3)}
    size = {"height": 128, "width": 128}
    return pipe, prompts(**pooled, **size, prior_num_inference_steps=3, decoder_guidance_scale=2.0)


def unclip():
    """Three schedulers, none of them `scheduler`."""
    parts = {
        "prior": diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=4, embedding_dim=8, num_layers=1, num_embeddings=6
        ),
        "decoder": diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=6, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), cross_attention_dim=8,
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", class_embed_type="identity",
        ),
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=8, time_embed_dim=32, cross_attention_dim=8),
        "super_res_first": unet_2d(sample_size=16, in_channels=6),
        "super_res_last": unet_2d(sample_size=16, in_channels=6),
        "prior_scheduler": diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(),
    }  # fmt: skip
    steps = {f"{part}_num_inference_steps": 3 for part in ("prior", "decoder", "super_res")}
    return UnCLIPPipeline(tokenizer=Tokenizer(), text_encoder=clip(), **parts), {"prompt": ["one", "two"], **steps}


def sana_parts(**more):
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32,
        **more,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    return {"transformer": transformer, "vae": autoencoder, **NO_TEXT}


SANA = {"height": 32, "width": 32, "use_resolution_binning": False}


def sana():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(scheduler=scheduler, **sana_parts())
    return pipe, prompts(torch.ones(2, 5), negative_prompt=None, **SANA)


def sana_sprint():
    network = sana_parts(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    pipe = diffusers.SanaSprintPipeline(scheduler=diffusers.SCMScheduler(), **network)
    mask = torch.ones(2, 5)
    return pipe, {"prompt_embeds": embeddings(), "prompt_attention_mask": mask, "intermediate_timesteps": None, **SANA}


# ---- videos, sound ----


def wan():
    """UniPC on flow sigmas."""
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, num_train_timesteps=1000
    )
    transformer = of_wan(diffusers.WanTransformer3DModel, rope_max_seq_len=32)
    pipe = diffusers.WanPipeline(**NO_TEXT, transformer=transformer, vae=wan_vae(), scheduler=scheduler)
    return pipe, prompts(guidance_scale=3.0, height=16, width=16, num_frames=5)


def anyflow():
    _, call = wan()
    more = {"rope_max_seq_len": 32, "gate_value": 0.25, "deltatime_type": "r"}
    transformer = of_wan(diffusers.AnyFlowTransformer3DModel, **more)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return diffusers.AnyFlowPipeline(**NO_TEXT, transformer=transformer, vae=wan_vae(), scheduler=scheduler), call


def helios():
    _, call = wan()
    more = {"has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True}
    transformer = of_wan(diffusers.HeliosTransformer3DModel, rope_dim=(4, 4, 4), is_amplify_history=False, **more)
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return diffusers.HeliosPipeline(**NO_TEXT, transformer=transformer, vae=wan_vae(), scheduler=scheduler), call


def cogvideox(scheduler):
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=5,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}
    scheduler = getattr(diffusers, f"CogVideoX{scheduler}Scheduler")(timestep_spacing="trailing", **config)
    pipe = diffusers.CogVideoXPipeline(**NO_TEXT, vae=autoencoder, transformer=transformer, scheduler=scheduler)
    return pipe, prompts(height=16, width=16, num_frames=9)


def ltx_parts():
    eights, falses = (8,) * 4, (False,) * 4
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
        caption_channels=8,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=eights, decoder_block_out_channels=eights, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False), patch_size=1, patch_size_t=1,
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False, *falses),
        upsample_residual=falses, upsample_factor=(1,) * 4,
    )  # fmt: skip
    return {"transformer": transformer, "vae": autoencoder}


LTX = {"height": 32, "width": 32}


def ltx():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    pipe = diffusers.LTXPipeline(scheduler=scheduler, **ltx_parts(), **NO_TEXT)
    return pipe, prompts(torch.ones(2, 5, dtype=torch.bool), num_frames=9, **LTX)


def ltx_windows():
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(
        scheduler=scheduler, **ltx_parts(), tokenizer=Tokenizer(), text_encoder=t5()
    )
    call = {"prompt": "a|b", "negative_prompt": "", "num_frames": 17, "guidance_scale": 3.0, **LTX}
    return pipe, {**call, "temporal_tile_size": 16, "temporal_overlap": 8, "max_sequence_length": 6}


def stable_audio(scheduler):
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=1, attention_head_dim=4, num_attention_heads=2, num_key_value_attention_heads=2,
        out_channels=3, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = getattr(diffusers, f"{scheduler}Scheduler")(sigma_schedule="exponential")
    pipe = diffusers.StableAudioPipeline(
        transformer=transformer, scheduler=scheduler, vae=autoencoder, text_encoder=t5(), tokenizer=Tokenizer(),
        projection_model=projection,
    )  # fmt: skip
    mask = torch.ones(2, 5, dtype=torch.long)
    return pipe, prompts(attention_mask=mask, negative_attention_mask=mask)


def with_schedulers(**configs):
    return {
        f"StableDiffusionPipeline-{name}": functools.partial(stable_diffusion, name.partition("-")[0], **more)
        for name, more in configs.items()
    }


PIPELINES = {
    "DDPMPipeline": ddpm,
    "DDIMPipeline": ddim,
    "StableDiffusionPipeline": stable_diffusion,
    **with_schedulers(
        DDPM={}, EulerAncestralDiscrete={}, DPMSolverMultistep={"algorithm_type": "sde-dpmsolver++"}, HeunDiscrete={},
        LCM={}, UniPCMultistep={}, PNDM={"skip_prk_steps": True},
    ),
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "DiTPipeline": dit,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "WanPipeline": wan,
    "CogVideoXPipeline-DPM": functools.partial(cogvideox, "DPM"),
    "StableCascadeCombinedPipeline": stable_cascade,
    "UnCLIPPipeline": unclip,
    "LTXPipeline": ltx,
    "SanaPipeline": sana,
}  # fmt: skip
DEEP = {
    **with_schedulers(
        IPNDM={}, LMSDiscrete={}, DEISMultistep={}, KDPM2Discrete={}, KDPM2AncestralDiscrete={}, DPMSolverSinglestep={},
        TCD={}, DDIMParallel={}, DDPMParallel={}, **{"PNDM-prk": {"skip_prk_steps": False}},
    ),
    "StableDiffusionDiffEditPipeline": diffedit,
    "PNDMPipeline": pndm,
    "ScoreSdeVePipeline": score_sde_ve,
    "ConsistencyModelPipeline": consistency,
    "RePaintPipeline": repaint,
    "SanaSprintPipeline": sana_sprint,
    "CogVideoXPipeline-DDIM": functools.partial(cogvideox, "DDIM"),
    "LTXI2VLongMultiPromptPipeline": ltx_windows,
    "AnyFlowPipeline": anyflow,
    "HeliosPipeline": helios,
    "StableAudioPipeline-EDMDPMSolverMultistep": functools.partial(stable_audio, "EDMDPMSolverMultistep"),
}  # fmt: skip
if is_torchsde_available():
    DEEP |= {
        **with_schedulers(DPMSolverSDE={"noise_sampler_seed": 3}),
        "StableAudioPipeline-CosineDPMSolverMultistep": functools.partial(stable_audio, "CosineDPMSolverMultistep"),
    }
