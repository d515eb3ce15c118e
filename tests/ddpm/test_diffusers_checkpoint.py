"""Directories that diffusers saved: every layout loads, and everything else is refused with one clear sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from ddpm.checkpoints import Checkpoint, load_checkpoint
from ddpm.checkpoints.diffusers import OLD_ATTENTION
from tests.helpers import TINY, WEIGHTS, save_tiny, tiny_unet

BIN = "diffusion_pytorch_model.bin"


@pytest.fixture
def pipeline(tmp_path) -> Path:
    return save_tiny(tmp_path / "pipe", variance_type="fixed_large")


@pytest.fixture
def flat(tmp_path, pipeline) -> Path:
    directory = tmp_path / "flat"
    directory.mkdir()
    for file in ("model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"):
        shutil.copy(pipeline / file, directory)
    return directory


def edit(path: Path, **changes) -> None:
    """Set keys of a JSON file; None as value of `drop=[...]` names keys to remove."""
    dropped = changes.pop("drop", ())
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in dropped}))


def refusal(source, **options) -> str:
    """The sentence with which a source is refused: a ValueError of one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the caller checks the text)
        load_checkpoint(source, **options)
    sentence = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in sentence
    return sentence


def assert_same_weights(checkpoint: Checkpoint, pipeline: Path) -> None:
    expected = load_file(pipeline / "unet" / WEIGHTS)
    state = checkpoint.network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in expected)
    assert not any(p.requires_grad for p in checkpoint.network.parameters())
    assert not checkpoint.network.training


def said(checkpoint: Checkpoint, kind: str, text: str) -> bool:
    return any(text in entry for entry in getattr(checkpoint.report, kind))


def test_a_pipeline(pipeline):
    checkpoint = load_checkpoint(pipeline)
    assert_same_weights(checkpoint, pipeline)
    assert (checkpoint.family, checkpoint.source) == ("diffusers", str(pipeline))
    assert checkpoint.rules.variance_type == "fixed_large"
    assert checkpoint.schedule.num_train_timesteps == 100
    assert (checkpoint.sample_size, checkpoint.image_channels) == ((8, 8), 3)
    assert checkpoint.uint8_rounding == "half_to_even"
    assert said(checkpoint, "found", str(pipeline / "unet" / WEIGHTS))
    assert said(checkpoint, "found", str(pipeline / "scheduler" / "scheduler_config.json"))


def test_a_flat_directory(flat, pipeline):
    checkpoint = load_checkpoint(flat)
    assert_same_weights(checkpoint, pipeline)
    assert checkpoint.rules.variance_type == "fixed_large"
    assert checkpoint.schedule.num_train_timesteps == 100


def test_a_string_with_a_home_directory(pipeline, monkeypatch):
    monkeypatch.setenv("HOME", str(pipeline.parent))
    assert_same_weights(load_checkpoint("~/pipe"), pipeline)


@pytest.mark.parametrize("of", ["pipeline", "flat"])
def test_a_weight_file_stands_for_its_directory(request, of, pipeline):
    directory = request.getfixturevalue(of)
    path = directory / "unet" / WEIGHTS if of == "pipeline" else directory / WEIGHTS
    checkpoint = load_checkpoint(path)
    assert_same_weights(checkpoint, pipeline)
    assert checkpoint.rules.variance_type == "fixed_large"


def test_a_pickle_of_weights(pipeline):
    weights = pipeline / "unet" / WEIGHTS
    torch.save(load_file(weights), pipeline / "unet" / BIN)
    weights.rename(pipeline / "unet" / "kept")
    checkpoint = load_checkpoint(pipeline)
    (pipeline / "unet" / "kept").rename(weights)
    assert_same_weights(checkpoint, pipeline)
    assert said(checkpoint, "found", BIN)


def test_safetensors_come_before_a_pickle(pipeline):
    torch.save({"other": torch.zeros(1)}, pipeline / "unet" / BIN)
    assert_same_weights(load_checkpoint(pipeline), pipeline)


def test_a_variant_is_loaded_as_float32(tmp_path, pipeline):
    saved = tmp_path / "fp16"
    DDPMPipeline.from_pretrained(pipeline, torch_dtype=torch.float16).save_pretrained(saved, variant="fp16")
    assert (saved / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    checkpoint = load_checkpoint(saved, variant="fp16")
    expected = load_file(pipeline / "unet" / WEIGHTS)
    for key, value in checkpoint.network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[key].half().float())
    assert said(checkpoint, "given", "variant = fp16")
    sentence = refusal(saved)
    assert "diffusion_pytorch_model.fp16.safetensors" in sentence
    assert "variant=" in sentence


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path, pipeline, variant):
    unet = tiny_unet()
    saved = tmp_path / "sharded"
    unet.save_pretrained(saved, max_shard_size="20KB", variant=variant)
    assert len(list(saved.glob("*-of-*.safetensors"))) > 2
    checkpoint = load_checkpoint(saved, **({"variant": variant} if variant else {}))
    assert_same_weights(checkpoint, pipeline)


def test_a_missing_shard(tmp_path):
    tiny_unet().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    sentence = refusal(tmp_path)
    assert f"{WEIGHTS}.index.json names the shard {shard.name}, which is not beside it" in sentence


def test_a_shard_outside_the_directory_is_refused(tmp_path, pipeline):
    saved = tmp_path / "sharded"
    tiny_unet().save_pretrained(saved, max_shard_size="20KB")
    index = saved / f"{WEIGHTS}.index.json"
    mapping = dict.fromkeys(json.loads(index.read_text())["weight_map"], f"../pipe/unet/{WEIGHTS}")
    edit(index, weight_map=mapping)
    assert "which is not beside it" in refusal(saved)


def test_an_index_without_a_map(tmp_path):
    tiny_unet().save_pretrained(tmp_path, max_shard_size="20KB")
    edit(tmp_path / f"{WEIGHTS}.index.json", drop=["weight_map"])
    assert f"{WEIGHTS}.index.json has no weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_old_attention_keys(pipeline, flat, suffix):
    new = load_file(flat / WEIGHTS)
    old = {}
    for key, value in new.items():
        for before, after in OLD_ATTENTION.items():
            key = key.replace(f".{after}.", f".{before}.") if "attentions" in key else key
        old[key] = value
    assert sum(k not in new for k in old) == 8 * 4  # q, k, v, out of 1 + 1 + 2 attentions, weight and bias
    (flat / WEIGHTS).unlink()
    if suffix == "bin":
        torch.save(old, flat / BIN)
    else:
        save_file(old, flat / WEIGHTS)
    checkpoint = load_checkpoint(flat)
    assert_same_weights(checkpoint, pipeline)
    assert said(checkpoint, "inferred", "old diffusers version and were renamed")


def test_predict_epsilon_false_means_x_0(flat):
    edit(flat / "scheduler_config.json", predict_epsilon=False, drop=["prediction_type"])
    checkpoint = load_checkpoint(flat)
    assert checkpoint.rules.prediction_type == "sample"
    assert said(checkpoint, "inferred", "predict_epsilon = false")


def test_predict_epsilon_true_changes_nothing(flat):
    edit(flat / "scheduler_config.json", predict_epsilon=True, drop=["prediction_type"])
    assert load_checkpoint(flat).rules.prediction_type == "epsilon"


def test_no_scheduler_is_assumed_to_be_ddpm_and_said(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.schedule.num_train_timesteps == 1000
    assert checkpoint.rules.variance_type == "fixed_small"
    assert said(checkpoint, "assumed", "no scheduler configuration: DDPMScheduler")


def test_a_short_configuration_takes_the_defaults_and_says_so(flat):
    edit(flat / "scheduler_config.json", drop=["clip_sample", "variance_type", "timestep_spacing"])
    edit(flat / "config.json", drop=["norm_eps", "downsample_padding", "flip_sin_to_cos"])
    checkpoint = load_checkpoint(flat)
    assert checkpoint.rules.variance_type == "fixed_small"
    assert checkpoint.network.config.norm_eps == 1e-5
    assert checkpoint.network.config.downsample_padding == 1
    assert said(checkpoint, "assumed", "scheduler: diffusers' defaults for variance_type, clip_sample")
    assert said(checkpoint, "assumed", "unet: diffusers' defaults for freq") is False
    assert said(checkpoint, "assumed", "flip_sin_to_cos")


def test_values_that_diffusers_marks_as_defaults_are_dropped(flat):
    edit(flat / "scheduler_config.json", variance_type="fixed_large", _use_default_values=["variance_type"])
    assert load_checkpoint(flat).rules.variance_type == "fixed_small"


def test_the_prefix_unetres(flat, pipeline):
    edit(
        flat / "config.json",
        down_block_types=[f"UNetRes{b}" for b in TINY["down_block_types"]],
        up_block_types=[f"UNetRes{b}" for b in TINY["up_block_types"]],
    )
    assert_same_weights(load_checkpoint(flat), pipeline)


def test_unknown_settings_are_ignored_and_reported(flat, pipeline):
    edit(flat / "config.json", decay=0.9999, optimization_step=7)
    edit(flat / "scheduler_config.json", tensor_format="pt")
    checkpoint = load_checkpoint(flat)
    assert_same_weights(checkpoint, pipeline)
    assert said(checkpoint, "ignored", "unet: settings without effect here: decay, optimization_step")
    assert said(checkpoint, "ignored", "tensor_format")


def test_thresholding_goes_before_clipping(flat):
    edit(flat / "scheduler_config.json", thresholding=True, clip_sample=True, sample_max_value=1.5)
    rules = load_checkpoint(flat).rules
    assert (rules.clip, rules.threshold_max) == ("dynamic", 1.5)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(pipeline, monkeypatch):
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = load_checkpoint("someone/some-ddpm.v2", revision="abc")
    assert_same_weights(checkpoint, pipeline)
    assert checkpoint.source == "someone/some-ddpm.v2"
    repository, options = calls[0]
    assert (repository, options["revision"]) == ("someone/some-ddpm.v2", "abc")
    assert {"unet/*.safetensors", "*.safetensors", "scheduler/*.json", "unet/*.bin"} <= set(options["allow_patterns"])


def test_a_hub_id_that_cannot_be_downloaded(monkeypatch):
    def snapshot_download(repository, **options):
        raise ConnectionError("no route to host\nand a long trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    sentence = refusal("google/ddpm-cifar10-32")
    assert sentence.startswith("google/ddpm-cifar10-32 ")
    assert "no route to host" in sentence


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such/directory", "/no/such/file.safetensors", "nowhere"])
def test_a_missing_path(name):
    sentence = refusal(name)
    assert sentence.startswith(f"{name} does not exist")


def test_an_empty_directory(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path} is an empty directory; expected model_index.json or config.json")


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert f"{tmp_path} holds no model_index.json or config.json" in refusal(tmp_path)


def test_a_directory_without_weights(pipeline):
    (pipeline / "unet" / WEIGHTS).unlink()
    sentence = refusal(pipeline)
    assert f"{pipeline / 'unet'} has no {WEIGHTS} or .bin" in sentence
    assert "found no weight file" in sentence


def test_a_directory_without_the_networks_configuration(pipeline):
    (pipeline / "unet" / "config.json").unlink()
    assert f"{pipeline / 'unet' / 'config.json'} does not exist" in refusal(pipeline)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_safetensors(flat, keep):
    path = flat / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    for source in (flat, path):
        sentence = refusal(source)
        assert str(path) in sentence
        assert "is not a complete safetensors file" in sentence


@pytest.mark.parametrize("keep", [0, 10, 2000, -100])
def test_a_truncated_pickle(flat, keep):
    torch.save(load_file(flat / WEIGHTS), flat / BIN)
    (flat / WEIGHTS).unlink()
    path = flat / BIN
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a complete file of torch.save" in refusal(flat)


def test_a_missing_key(flat):
    state = load_file(flat / WEIGHTS)
    del state["mid_block.resnets.0.conv1.weight"]
    save_file(state, flat / WEIGHTS)
    sentence = refusal(flat)
    assert f"{flat / WEIGHTS} lacks 1 of {len(state) + 1} keys, first mid_block.resnets.0.conv1.weight" in sentence


def test_an_unknown_key(flat):
    state = load_file(flat / WEIGHTS)
    save_file(state | {"controlnet.weight": torch.zeros(1)}, flat / WEIGHTS)
    sentence = refusal(flat)
    assert f"{flat / WEIGHTS} has unknown 1 of {len(state)} keys, first controlnet.weight" in sentence


def test_a_wrong_shape(flat):
    state = load_file(flat / WEIGHTS)
    save_file(state | {"conv_in.weight": torch.zeros(8, 3, 5, 5)}, flat / WEIGHTS)
    sentence = refusal(flat)
    assert str(flat / WEIGHTS) in sentence
    assert "conv_in.weight is [8, 3, 5, 5], expected [8, 3, 3, 3]" in sentence


def test_weights_that_are_not_finite(flat):
    state = load_file(flat / WEIGHTS)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, flat / WEIGHTS)
    assert "NaN or infinity in 1 tensors, first conv_in.bias" in refusal(flat)


@pytest.mark.parametrize("name", [BIN, "optimizer.bin", "optimizer.pt"])
def test_an_optimizers_file(flat, name):
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    (flat / WEIGHTS).unlink()
    torch.save(optimizer.state_dict(), flat / name)
    sentence = refusal(flat / name)
    assert f"{flat / name} holds an optimizer's state, not weights" in sentence
    if name == BIN:
        assert "optimizer's state" in refusal(flat)


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["torch.save", "torch.save, old format", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(flat, tmp_path, how):
    proof = tmp_path / "the-code-ran"
    (flat / WEIGHTS).unlink()
    content = {"conv_in.weight": torch.zeros(8, 3, 3, 3), "x": Payload(proof)}
    path = flat / BIN
    if how == "pickle":
        path.write_bytes(pickle.dumps({"x": Payload(proof)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    for source in (flat, path):
        sentence = refusal(source)
        assert str(path) in sentence
        assert "holds more than tensors, and running its code would not be safe" in sentence
        assert not proof.exists()


def test_a_pickle_of_another_content(flat):
    (flat / WEIGHTS).unlink()
    for content, found in (([torch.zeros(1)], "list"), ({"epoch": 3, "model": {}}, "dict with keys epoch, model")):
        torch.save(content, flat / BIN)
        sentence = refusal(flat)
        assert f"{flat / BIN} holds {found}" in sentence
        assert "expected a state dict" in sentence


def test_weights_alone(tmp_path, pipeline):
    alone = tmp_path / WEIGHTS
    shutil.copy(pipeline / "unet" / WEIGHTS, alone)
    sentence = refusal(alone)
    assert f"{alone} has no config.json beside it" in sentence


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG")
    assert f"{path} is not a checkpoint" in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_configuration(flat, text):
    (flat / "config.json").write_text(text)
    sentence = refusal(flat)
    assert str(flat / "config.json") in sentence
    assert "JSON" in sentence


@pytest.mark.parametrize("name", ["PNDMScheduler", "ScoreSdeVeScheduler", "MyOwn"])
def test_another_scheduler_class(pipeline, flat, name):
    edit(pipeline / "model_index.json", scheduler=["diffusers", name])
    sentence = refusal(pipeline)
    assert str(pipeline / "scheduler" / "scheduler_config.json") in sentence
    assert f"scheduler class {name} is not supported, only DDPMScheduler and DDIMScheduler" in sentence
    checkpoint = load_checkpoint(pipeline, scheduler_class="DDPMScheduler")
    assert said(checkpoint, "given", "scheduler_class = DDPMScheduler")
    # Without a model_index.json the class that wrote the configuration decides.
    (flat / "model_index.json").unlink()
    edit(flat / "scheduler_config.json", _class_name=name)
    assert f"scheduler class {name} is not supported, only DDPMScheduler and DDIMScheduler" in refusal(flat)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "block type 'SkipDownBlock2D' is not supported"),
        ({"up_block_types": ["AttnUpBlock2D", "AttnSkipUpBlock2D"]}, "block type 'AttnSkipUpBlock2D' is not supported"),
        ({"down_block_types": ["UpBlock2D", "AttnDownBlock2D"]}, "block type 'UpBlock2D' is not supported"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type 'UNetMidBlock2DCrossAttn' is not supported"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift 'spatial' is not supported"),
        ({"norm_num_groups": None}, "norm_num_groups is null"),
        ({"norm_num_groups": 5}, "norm_num_groups=5 does not divide"),
        ({"act_fn": "tanh"}, "activation 'tanh' is not one of"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection' is not one of"),
        ({"time_embedding_type": "rotary"}, "time_embedding 'rotary' is not one of"),
        ({"sample_size": None}, "has no sample_size"),
        ({"sample_size": 9}, "need a multiple of 2"),
        ({"out_channels": 6}, "has out_channels=6, but variance_type 'fixed_large' with 3 image channels needs 3"),
        ({"block_out_channels": 8}, "describes no network"),
    ],
)
def test_a_network_that_is_not_supported(flat, changes, sentence):
    edit(flat / "config.json", **changes)
    if "out_channels" in changes:
        state = load_file(flat / WEIGHTS)
        wide = {"conv_out.weight": torch.zeros(6, 8, 3, 3), "conv_out.bias": torch.zeros(6)}
        save_file(state | wide, flat / WEIGHTS)
    text = refusal(flat)
    assert str(flat / "config.json") in text
    assert sentence in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variance_type": "fixed_large_log"}, "NaN at every step"),
        ({"variance_type": "huge"}, "variance_type 'huge' is not one of"),
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not one of"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras' is not one of"),
        ({"beta_schedule": "exp"}, "beta_schedule 'exp' is not one of"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps must be a positive integer; got 'many'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a positive integer; got 0"),
        ({"beta_start": "small"}, "describes no noise schedule"),
        ({"trained_betas": [0.1, 0.2, 0.3]}, "trained_betas has 3 entries for num_train_timesteps=100"),
    ],
)
def test_a_schedule_that_is_not_supported(flat, changes, sentence):
    edit(flat / "scheduler_config.json", **changes)
    text = refusal(flat)
    assert str(flat / "scheduler_config.json") in text
    assert sentence in text


def test_a_learned_variance_needs_six_channels(flat):
    edit(flat / "scheduler_config.json", variance_type="learned_range")
    sentence = refusal(flat)
    assert "has out_channels=3, but variance_type 'learned_range' with 3 image channels needs 6" in sentence


def test_unknown_options(pipeline):
    assert refusal(pipeline, beta_schedule="linear").startswith("unknown option beta_schedule")


def test_averaged_weights_of_a_training_checkpoint(tmp_path):
    """accelerate's checkpoint-N/ holds unet/ and unet_ema/; the scheduler lies one directory above."""
    directory = tmp_path / "checkpoint-500"
    raw, averaged = tiny_unet(0), tiny_unet(1)
    raw.save_pretrained(directory / "unet")
    averaged.save_pretrained(directory / "unet_ema")
    config = json.loads((directory / "unet_ema" / "config.json").read_text())
    config |= {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 500}
    (directory / "unet_ema" / "config.json").write_text(json.dumps(config))
    DDPMScheduler(num_train_timesteps=77).save_pretrained(tmp_path / "scheduler")
    checkpoint = load_checkpoint(directory)
    assert torch.equal(checkpoint.network.conv_in.weight, averaged.conv_in.weight)
    assert checkpoint.schedule.num_train_timesteps == 77
    assert "averaged (EMA) weights, from unet_ema/; ema=False takes unet/" in checkpoint.report.inferred
    assert torch.equal(load_checkpoint(directory, ema=False).network.conv_in.weight, raw.conv_in.weight)
    with pytest.warns(UserWarning, match="holds raw weights; those in unet_ema/ beside it draw better images"):
        raw_checkpoint = load_checkpoint(directory / "unet")
    assert raw_checkpoint.schedule.num_train_timesteps == 77
    # a file is that file, whatever lies beside it, with the scheduler of the run
    for name, network in (("unet", raw), ("unet_ema", averaged)):
        checkpoint = load_checkpoint(directory / name / WEIGHTS)
        assert torch.equal(checkpoint.network.conv_in.weight, network.conv_in.weight)
        assert checkpoint.schedule.num_train_timesteps == 77
    with pytest.raises(ValueError, match="has no unet_ema/, so ema=True has nothing to take"):
        load_checkpoint(directory / "unet_ema", ema=True)


def test_a_variant_by_its_own_path(tmp_path):
    plain, other = tiny_unet(0), tiny_unet(1)
    plain.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="fp16")
    path = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    checkpoint = load_checkpoint(path)
    for option in ({"variant": "fp16"}, {"ema": True}):
        with pytest.raises(ValueError, match=r"holds one set of weights, so .* has nothing to choose"):
            load_checkpoint(path, **option)
    assert torch.equal(checkpoint.network.conv_in.weight, other.conv_in.weight)


def test_a_ddim_scheduler_has_no_variance_type(tmp_path):
    pipe = save_tiny(tmp_path / "pipe")
    edit(pipe / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(pipe / "scheduler" / "scheduler_config.json", variance_type="fixed_large_log")
    assert load_checkpoint(pipe).rules.sampler == "ddim"
