"""Stable Diffusion models come in whole from folders, single files and the Hub's cache, or are refused."""

import json
import math
import pickle
import shutil
import socket
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from pipelines import zoo
from pipelines.adapters import tensor_file
from pipelines.sd import checkpoints, loading, repository, vocabulary
from pipelines.sd.checkpoints import SingleFile
from pipelines.sd.kinds import kind_of
from pipelines.sd.parts import Kind, Parts
from schemas.errors import AssetError
from tests.support import sd_files

KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: dict[Kind, str] = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl"}
PIPELINES = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {kind: zoo.locate(name, root) for kind, name in NAMES.items()}


@pytest.fixture(scope="module")
def models(folders: dict[Kind, Path]) -> dict[Kind, Parts]:
    return {kind: load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def files(models: dict[Kind, Parts], tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("files")
    return {kind: sd_files.write(parts, root / f"{kind}.safetensors") for kind, parts in models.items()}


@pytest.fixture
def copy(folders: dict[Kind, Path], tmp_path: Path) -> Callable[[Kind], Path]:
    """An embedded model's folder of one's own."""
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def load(source: Path | str, **more: Any) -> Parts:
    return loading.inspect(source, more.pop("dtype", torch.float32), **more).load("cpu")


def refusal(source: Path | str, **more: Any) -> str:
    with pytest.raises(AssetError) as caught:
        load(source, **more)
    assert caught.value.kind == "invalid_weights"
    return caught.value.message


def edit(folder: Path, component: str, **changes: Any) -> Path:
    """Change a component's config; None removes a key."""
    path = next((folder / component).glob("*config.json"))
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path)


@torch.inference_mode()
def outputs(parts: Parts) -> list[Tensor]:
    """What every component makes of the same inputs."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    pixels = torch.randn(1, 3, 32, 32, generator=draw)
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders, strict=True):
        ids = tokenizer("A red fox!", padding="max_length", return_tensors="pt").input_ids
        encoded = encoder(ids, output_hidden_states=True)
        hidden.append(encoded.hidden_states[-2])
        pooled = encoded[0]
    added = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)} if parts.kind == "sdxl" else None
    noise = parts.unet(latents, 500, torch.cat(hidden, dim=-1), added_cond_kwargs=added).sample
    encoded = parts.vae.encode(pixels).latent_dist.parameters
    return [*hidden, pooled, noise, encoded, parts.vae.decode(latents).sample]


def assert_same(one: Parts, other: Parts) -> None:
    assert one.kind == other.kind
    assert one.scheduler_config == other.scheduler_config
    for module, twin in zip(one.modules, other.modules, strict=True):
        mine, theirs = module.state_dict(), twin.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for ours, its in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)  # sums depend on where tensors lie


# from folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_what_diffusers_makes_of_it(kind: Kind, folders: dict[Kind, Path]) -> None:
    parts = load(folders[kind])
    stock = PIPELINES[kind].from_pretrained(folders[kind])
    encoders = [getattr(stock, name, None) for name in ("text_encoder", "text_encoder_2")]
    tokenizers = [getattr(stock, name, None) for name in ("tokenizer", "tokenizer_2")]
    theirs = Parts(
        kind,
        stock.unet,
        stock.vae,
        tuple(filter(None, tokenizers)),
        tuple(filter(None, encoders)),
        parts.scheduler_config,
    )
    assert parts.kind == kind
    assert_same(parts, theirs)
    assert dict(stock.scheduler.config).items() >= parts.scheduler_config.items() - {"_class_name"}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_whole_quiet_and_counted(kind: Kind, models: dict[Kind, Parts]) -> None:
    parts = models[kind]
    for module in parts.modules:
        assert not module.training
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        assert not any(tensor.requires_grad for tensor in module.parameters())
    weights = sum(4 * each.numel() for module in parts.modules for each in module.parameters())
    positions = sum(8 * 77 for _ in parts.text_encoders)
    assert parts.nbytes == weights + positions
    assert parts.scheduler_config["_class_name"].endswith("Scheduler")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_only_sdxls_vae_stays_wide_and_only_in_float16(
    kind: Kind, dtype: torch.dtype, folders: dict[Kind, Path]
) -> None:
    parts = load(folders[kind], dtype=dtype)
    assert {module.dtype for module in (parts.unet, *parts.text_encoders)} == {dtype}
    overflows = kind == "sdxl" and dtype == torch.float16
    assert parts.vae.dtype == (torch.float32 if overflows else dtype)


def test_a_vae_that_was_fixed_runs_in_float16(copy: Callable[[Kind], Path]) -> None:
    fixed = edit(copy("sdxl"), "vae", force_upcast=False)
    assert load(fixed, dtype=torch.float16).vae.dtype == torch.float16


def test_the_vaes_of_2022_load_by_the_old_names_of_their_attention(
    copy: Callable[[Kind], Path], models: dict[Kind, Parts]
) -> None:
    folder = copy("sd1")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for new, name in old.items():
            tensors = {
                key.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): tensor
                for key, tensor in tensors.items()
            }
        return tensors

    edit_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert any(".proj_attn." in key for key in load_file(folder / "vae/diffusion_pytorch_model.safetensors"))
    assert_same(load(folder), models["sd1"])


def test_text_encoders_load_by_the_names_from_before_transformers_5_6(
    copy: Callable[[Kind], Path], models: dict[Kind, Parts]
) -> None:
    folder = copy("sdxl")
    unread = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(32, 32),
        "logit_scale": torch.ones(1),
    }
    edit_weights(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: {f"text_model.{name}": tensor for name, tensor in tensors.items()} | unread,
    )
    assert_same(load(folder), models["sdxl"])


def test_shards_are_read_together(copy: Callable[[Kind], Path], models: dict[Kind, Parts]) -> None:
    folder = copy("sd2")
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(
        folder / "unet", max_shard_size="100KB", safe_serialization=True
    )
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert_same(load(folder), models["sd2"])


# the end of a text


def test_the_end_token_is_the_tokenizers_though_configs_say_2(copy: Callable[[Kind], Path]) -> None:
    """A word learned later has a higher id than the end; the pooled text is still the end's."""
    folder = copy("sdxl")
    for name in ("text_encoder", "text_encoder_2"):
        edit(folder, name, eos_token_id=2)
    parts = load(folder)
    tokenizer, encoder = parts.tokenizers[1], parts.text_encoders[1]
    assert encoder.config.eos_token_id == tokenizer.eos_token_id == 513
    tokenizer.add_tokens(["<fox>"])
    encoder.resize_token_embeddings(len(tokenizer))
    ids = tokenizer("a <fox>", padding="max_length", return_tensors="pt").input_ids
    encoded = encoder(ids)
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    assert ids[0].argmax() < end
    assert torch.allclose(encoded.text_embeds[0], encoder.text_projection(encoded.last_hidden_state[0, end]))


# variants


@pytest.fixture
def half(folders: dict[Kind, Path], tmp_path: Path) -> Path:
    """A repository with half-precision files beside the plain ones of its UNet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"], dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", safe_serialization=True, variant="fp16")
    return tmp_path / "half"


def test_a_variant_is_read_where_it_is_and_the_rest_plain(
    half: Path, folders: dict[Kind, Path], models: dict[Kind, Parts]
) -> None:
    shutil.copytree(folders["sd1"] / "vae", half / "vae", dirs_exist_ok=True)
    (half / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    parts = load(half, variant="fp16")
    for mine, plain in zip(parts.unet.parameters(), models["sd1"].unet.parameters(), strict=True):
        assert torch.equal(mine, plain.half().float())
    for mine, plain in zip(parts.vae.parameters(), models["sd1"].vae.parameters(), strict=True):
        assert torch.equal(mine, plain)


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(
    half: Path, folders: dict[Kind, Path]
) -> None:
    assert "no safetensors files of the variant 'ema'; it has fp16" in refusal(half, variant="ema")
    assert "it has plain ones only" in refusal(folders["sd1"], variant="fp16")
    assert "no safetensors file in text_encoder. It has the variant fp16" in refusal(half)


def test_a_variant_is_a_name_not_a_pattern(half: Path) -> None:
    assert "no safetensors files of the variant" in refusal(half, variant=".*")
    assert "no safetensors files of the variant" in refusal(half, variant="../fp16")


# from single files


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_gives_what_its_folder_gives(
    kind: Kind, files: dict[Kind, Path], folders: dict[Kind, Path], models: dict[Kind, Parts]
) -> None:
    assert_same(load(files[kind], configs=folders), models[kind])


def test_a_file_is_known_by_its_content_not_its_name(
    files: dict[Kind, Path], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    nameless = tmp_path / "0123abcd"
    shutil.copy(files["sdxl"], nameless)
    assert load(nameless, configs=folders).kind == "sdxl"


@pytest.mark.parametrize(
    ("kind", "notes", "mark", "expected"),
    [
        ("sd1", {}, (), ("epsilon", None)),
        ("sd2", {}, (), ("v_prediction", False)),  # as the config says
        ("sd1", {"modelspec.prediction_type": "v"}, (), ("v_prediction", None)),
        ("sd2", {"modelspec.predict_key": "epsilon"}, (), ("epsilon", False)),
        ("sdxl", {"modelspec.prediction_type": "nonsense"}, (), ("epsilon", False)),
        ("sdxl", {}, ("v_pred",), ("v_prediction", False)),
        ("sdxl", {"modelspec.prediction_type": "epsilon"}, ("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_what_a_file_predicts_is_told_by_marks_then_notes_then_the_config(
    kind: Kind,
    notes: dict[str, str],
    mark: tuple[str, ...],
    expected: tuple[str, bool | None],
    models: dict[Kind, Parts],
    folders: dict[Kind, Path],
    tmp_path: Path,
) -> None:
    marks = {name: torch.empty(0) for name in mark}
    path = sd_files.write(models[kind], tmp_path / "marked", notes, marks)
    config = load(path, configs=folders).scheduler_config
    assert (config["prediction_type"], config.get("rescale_betas_zero_snr")) == expected


def test_a_mark_without_data_may_stand_anywhere_in_the_header(tmp_path: Path) -> None:
    entries = {
        "weight": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        "v_pred": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "marked"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert tensor_file.read(path, limits=checkpoints.LIMITS).shapes == {"weight": (2,), "v_pred": (0,)}
    with pytest.raises(AssetError, match=r"v_pred has the shape \[0\]"):
        tensor_file.read(path)


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "epsilon"), (0.2, "v_prediction")])
def test_what_sd2_predicts_is_told_by_one_layers_spread(
    spread: float, expected: str, models: dict[Kind, Parts], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    """That layer stands only in a UNet of the full size, so the file's scheduler alone is asked."""
    bias = spread * torch.tensor([1.0, -1.0, 1.0, -1.0])
    path = sd_files.write(models["sd2"], tmp_path / "full", more={checkpoints._TELLING: bias})
    assert SingleFile(path, folders).scheduler()["prediction_type"] == expected


# the shipped configs


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], tuple[SingleFile, Parts, int]]:
    """A model of the published size, the file of its tensors' names and shapes, and how many there are."""
    root = tmp_path_factory.mktemp("hollow")
    made: dict[Kind, tuple[SingleFile, Parts, int]] = {}

    def make(kind: Kind) -> tuple[SingleFile, Parts, int]:
        if kind not in made:
            parts = full_size(kind)
            with torch.device("meta"):
                shapes = {name: tuple(each.shape) for name, each in sd_files.original(parts).items()}
            path = sd_files.write_hollow(shapes, root / f"{kind}.safetensors")
            made[kind] = SingleFile(path, loading.CONFIGS), parts, len(shapes)
        return made[kind]

    return make


class Shipped:
    """What a single file asks of the configs, without a file."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.folder = loading.CONFIGS[kind]

    def config(self, component: str) -> Any:
        return repository.read_config(self.folder / component / "config.json")

    def stored(self, component: str, module: Any) -> Any:
        return None

    def tokenizer(self, name: str, length: int) -> Any:
        return vocabulary.openai(self.folder / name, length)

    def scheduler(self) -> Any:
        return {}


def components(checkpoint: Any) -> list[Any]:
    suffixes = ("", "_2") if checkpoint.kind == "sdxl" else ("",)
    texts = [loading._text(checkpoint, suffix)[1] for suffix in suffixes]
    return [loading._unet(checkpoint), loading._autoencoder(checkpoint), *texts]


def full_size(kind: Kind) -> Parts:
    unet, vae, *texts = (each.module for each in components(Shipped(kind)))
    return Parts(kind, unet, vae, (), tuple(texts), {})


@pytest.mark.parametrize(
    ("kind", "expected", "tensors"),
    [
        ("sd1", [859.52, 83.65, 123.06], 1131),
        ("sd2", [865.91, 83.65, 340.39], None),  # its published file has more that nobody reads
        ("sdxl", [2567.46, 83.65, 123.06, 694.66], 2515),
    ],
)
def test_the_shipped_configs_make_the_published_models(
    kind: Kind, expected: list[float], tensors: int | None, hollow: Any
) -> None:
    """Millions of parameters, and the count of tensors in v1-5-pruned-emaonly and sd_xl_base_1.0."""
    _, parts, count = hollow(kind)
    millions = [sum(each.numel() for each in module.parameters()) / 1e6 for module in parts.modules]
    assert millions == pytest.approx(expected, abs=0.01)
    assert tensors is None or count - len(("alphas_cumprod", "betas")) == tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_published_size_fits_the_shipped_configs(kind: Kind, hollow: Any) -> None:
    file, parts, _ = hollow(kind)
    assert file.kind == kind_of(parts.unet.config) == kind
    for component in components(file):
        component.check()


@pytest.mark.parametrize(
    ("kind", "prediction", "scheduler"),
    [
        ("sd1", None, "PNDMScheduler"),
        ("sd2", "v_prediction", "DDIMScheduler"),
        ("sdxl", "epsilon", "EulerDiscreteScheduler"),
    ],
)
def test_the_shipped_schedulers_are_the_published_ones(kind: Kind, prediction: str, scheduler: str) -> None:
    config = repository.read_config(loading.CONFIGS[kind] / "scheduler" / "scheduler_config.json")
    assert (config["_class_name"], config.get("prediction_type")) == (scheduler, prediction)
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert not config["clip_sample"] and config["steps_offset"] == 1


@pytest.mark.parametrize(
    ("place", "pad"),
    [("sd1/tokenizer", 49407), ("sd2/tokenizer", 0), ("sdxl/tokenizer", 49407), ("sdxl/tokenizer_2", 0)],
)
def test_the_shipped_vocabulary_is_clips(place: str, pad: int) -> None:
    tokenizer = vocabulary.openai(loading.CONFIGS["sd1"].parent / place, 77)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    ids = tokenizer("A  PHOTO of\na cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]
    assert tokenizer.decode(ids[1:6]) == "a photo of a cat"


# tokenizers from folders

TEXTS = ["a red fox", "ÄÖ 漢字, it's!!", "🦊 <|endoftext|> x", "42 (words:1.3)", ""]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("as_words_and_merges", [False, True])
def test_a_tokenizer_reads_as_transformers_does(
    name: str, as_words_and_merges: bool, copy: Callable[[Kind], Path]
) -> None:
    folder = copy("sdxl") / name
    theirs = CLIPTokenizer.from_pretrained(folder)
    if as_words_and_merges:  # as repositories from before transformers 5 have them
        (folder / "vocab.json").write_text(json.dumps(theirs.get_vocab()))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer.json").unlink()
    ours = vocabulary.read(folder, 77)
    for text in TEXTS:
        expected = theirs(text, padding="max_length", truncation=True).input_ids
        assert ours(text, padding="max_length", truncation=True).input_ids == expected
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.model_max_length == 77


def test_merges_are_applied_and_learned_words_known(copy: Callable[[Kind], Path]) -> None:
    folder = copy("sd1") / "tokenizer"
    words = CLIPTokenizer.from_pretrained(folder).get_vocab()
    count = len(words)
    del words["<|startoftext|>"], words["<|endoftext|>"]
    pieces = sorted(words, key=words.__getitem__)
    pieces += ["fo", "fox</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nf o\nfo x</w>\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<fox>": len(pieces)}))
    (folder / "tokenizer.json").unlink()
    ids = vocabulary.read(folder, 77)("fox <fox>").input_ids
    assert ids == [count, count - 1, count + 2, count + 1]


def test_the_padding_of_special_tokens_map_goes_first(copy: Callable[[Kind], Path]) -> None:
    """SD 2.1's two files disagree, and it was trained with "!"."""
    folder = copy("sd1") / "tokenizer"
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert vocabulary.read(folder, 77).pad_token_id == 0


BROKEN_TOKENIZERS: dict[str, tuple[dict[str, str | bytes | None], str]] = {
    "no vocabulary": ({"tokenizer.json": None}, "has no vocabulary"),
    "no merges": ({"vocab.json": "{}"}, "has no merges.txt"),
    "no JSON": ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
    "deep JSON": ({"tokenizer.json": "[" * 100_000}, "tokenizer.json is not JSON"),
    "a list": ({"tokenizer.json": "[]"}, "is not an object"),
    "no model": ({"tokenizer.json": "{}"}, "has no model"),
    "words without ids": ({"tokenizer.json": '{"model": {"vocab": {"a": "1"}}}'}, "words to numbers"),
    "ids with a gap": ({"tokenizer.json": '{"model": {"vocab": {"a": 1}}}'}, "each once"),
    "no list of merges": ({"tokenizer.json": '{"model": {"vocab": {"a": 0}}}'}, "no list of merges"),
    "a merge of three": ({"tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": ["a a a"]}}'}, "merge"),
    "a merge to no word": ({"tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": ["a a"]}}'}, "third"),
    "no end": ({"tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": []}}'}, "no <|startoftext|>"),
    "a strange pad": ({"tokenizer_config.json": '{"pad_token": "<pad>"}'}, "no <pad>"),
    "added ids with a gap": ({"added_tokens.json": '{"<a>": 600}'}, "added tokens do not follow"),
    "more words than rows": ({"added_tokens.json": '{"<a>": 514}'}, "515 words, its text_encoder 514"),
    "bytes": ({"vocab.json": b"\xff", "merges.txt": ""}, "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_refused_in_a_sentence(case: str, copy: Callable[[Kind], Path]) -> None:
    changes, fault = BROKEN_TOKENIZERS[case]
    folder = copy("sd1")
    for name, content in changes.items():
        path = folder / "tokenizer" / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert fault in refusal(folder)


# another UNet


@pytest.fixture
def other(models: dict[Kind, Parts]) -> Any:
    """An SDXL UNet with values of its own."""
    torch.manual_seed(5)
    return UNet2DConditionModel.from_config(models["sdxl"].unet.config).eval()


def write_other(unet: Any, folder: Path, form: str) -> Path:
    path = folder / "other"
    match form:
        case "folder":
            unet.save_pretrained(path)
        case "repository":
            unet.save_pretrained(path / "unet")
        case "diffusers' names":  # as SDXL-Lightning's file
            save_file(unet.state_dict(), path)
        case "original names":
            save_file(sd_files.unet(unet), path)
        case "a whole file":
            named = {f"model.diffusion_model.{name}": each for name, each in sd_files.unet(unet).items()}
            save_file(named | {"first_stage_model.quant_conv.weight": torch.ones(1)}, path)
    return path


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "form", ["folder", "repository", "diffusers' names", "original names", "a whole file"]
)
def test_another_unet_takes_the_place_of_the_bases(
    form: str,
    whole: bool,
    other: Any,
    files: dict[Kind, Path],
    folders: dict[Kind, Path],
    models: dict[Kind, Parts],
    tmp_path: Path,
) -> None:
    base = files["sdxl"] if whole else folders["sdxl"]
    parts = load(base, unet=write_other(other, tmp_path, form), configs=folders)
    for name, tensor in parts.unet.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert all(map(torch.equal, outputs(parts)[-2:], outputs(models["sdxl"])[-2:]))  # the VAE is the base's
    assert not torch.equal(outputs(parts)[-3], outputs(models["sdxl"])[-3])


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ("folder", "The other UNet is one of sd1, the model is sdxl"),
        ("diffusers' names", "The other UNet has no place for down_blocks.0.attentions"),
        ("original names", "The model lacks a tensor, or has it in an unknown form: 'label_emb"),
    ],
)
def test_a_unet_of_another_kind_is_refused(
    form: str, fault: str, folders: dict[Kind, Path], models: dict[Kind, Parts], tmp_path: Path
) -> None:
    path = write_other(models["sd1"].unet, tmp_path, form)
    assert fault in refusal(folders["sdxl"], unet=path)


def test_a_unet_for_wider_texts_is_refused(
    models: dict[Kind, Parts], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    wider = UNet2DConditionModel.from_config(models["sd1"].unet.config, cross_attention_dim=40)
    wider.save_pretrained(tmp_path / "wider")
    assert "reads texts of width 40, the text encoders give 32" in refusal(
        folders["sd1"], unet=tmp_path / "wider"
    )
    save_file(wider.state_dict(), tmp_path / "file")
    assert "has the shape [8, 40] where [8, 32]" in refusal(folders["sd1"], unet=tmp_path / "file")


def test_what_is_no_unet_is_refused_by_what_it_is(folders: dict[Kind, Path], tmp_path: Path) -> None:
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)}
    save_file(lora, tmp_path / "lora")
    assert "not a UNet: it is a LoRA" in refusal(folders["sd1"], unet=tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    assert "no unet/config.json" in refusal(folders["sd1"], unet=tmp_path / "empty")


# kinds

REAL: dict[str, tuple[dict[str, Any], str]] = {
    "Stable Diffusion 1.5": ({"cross_attention_dim": 768}, "sd1"),
    "1.5 saved with linear projections": (
        {"cross_attention_dim": 768, "use_linear_projection": True},
        "sd1",
    ),
    "Stable Diffusion 2.1": ({"cross_attention_dim": 1024, "use_linear_projection": True}, "sd2"),
    "SDXL": ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "sdxl"),
    "SDXL's refiner": (
        {
            "cross_attention_dim": 1280,
            "addition_embed_type": "text_time",
            "block_out_channels": [384, 768, 1536, 1536],
        },
        "sdxl",  # its text encoders tell
    ),
    "another width": ({"cross_attention_dim": 1280}, "reads texts of width 1280"),
    "inpainting": ({"in_channels": 9}, "an inpainting model"),
    "InstructPix2Pix": ({"in_channels": 8}, "an InstructPix2Pix model"),
    "depth": ({"in_channels": 5}, "guided by depth"),
    "the upscaler": ({"in_channels": 7, "num_class_embeds": 1000}, "an upscaler"),
    "DeepFloyd": ({"in_channels": 3, "encoder_hid_dim": 4096}, "a model of pixels"),
    "Kandinsky": (
        {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        "such as Kandinsky's",
    ),
    "unCLIP": ({"class_embed_type": "projection"}, "such as unCLIP's"),
    "a Latent Consistency Model": ({"time_cond_proj_dim": 256}, "Latent Consistency"),
    "a video model": ({"_class_name": "UNet3DConditionModel"}, "a UNet3DConditionModel"),
    "strange inputs": ({"in_channels": [4]}, "with [4] input channels"),
}


@pytest.mark.parametrize("case", REAL)
def test_the_kind_of_published_unets(case: str) -> None:
    changes, expected = REAL[case]
    base = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "cross_attention_dim": 768,
        "block_out_channels": [320, 640, 1280, 1280],
    }
    if expected in KINDS:
        assert kind_of(base | changes) == expected
    else:
        with pytest.raises(AssetError) as caught:
            kind_of(base | changes)
        assert expected in caught.value.message


# refusals of folders


def without(*names: str) -> Callable[[Path], Any]:
    def remove(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name)

    return remove


def changed(component: str, **changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, component, **changes)


def reweighted(component: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit_weights(
            next((folder / component).glob("*.safetensors")), lambda tensors: tensors | change(tensors)
        )

    return apply


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def renamed_pickle(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps([1.0] * 100))


def first_layer_lost(folder: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("conv_in.")}

    edit_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", drop)


def text(folder: Path, name: str, content: str) -> int:
    return (folder / name).write_text(content)


REFUSED: dict[str, tuple[Kind, Callable[[Path], Any], str]] = {
    "only pickles": ("sd1", pickled, "no safetensors file in unet. It has pickles"),
    "a pickle by another name": ("sd1", renamed_pickle, "only safetensors files are accepted"),
    "no weights": ("sd1", without("vae"), "no vae/config.json"),
    "no text encoder": ("sd1", without("text_encoder"), "needs text_encoder; this one has none"),
    "half of SDXL's texts": ("sdxl", without("text_encoder_2"), "this one has text_encoder"),
    "the refiner": ("sdxl", without("text_encoder", "tokenizer"), "SDXL's refiner"),
    "no tokenizer": ("sd1", without("tokenizer"), "has no vocabulary"),
    "no scheduler": ("sd1", without("scheduler"), "no scheduler/scheduler_config.json"),
    "inpainting": ("sd1", changed("unet", in_channels=9), "an inpainting model"),
    "a ControlNet for a UNet": ("sd1", changed("unet", _class_name="ControlNetModel"), "a ControlNetModel"),
    "Playground 2.5": (
        "sdxl",
        changed("scheduler", _class_name="EDMEulerScheduler"),
        "EDMEulerScheduler, is not one",
    ),
    "Playground 2.5's VAE": ("sdxl", changed("vae", latents_mean=[1.0, 2.0, 3.0, 4.0]), "latents_mean"),
    "an asymmetric VAE": (
        "sd1",
        changed("vae", _class_name="AsymmetricAutoencoderKL"),
        "an? AsymmetricAutoencoderKL",
    ),
    "a VAE with depth": ("sd1", changed("vae", in_channels=6), "in_channels is not 3"),
    "XLM-R for a text encoder": ("sd1", changed("text_encoder", model_type="xlm-roberta"), "not CLIP's"),
    "quantized": ("sd1", changed("unet", quantization_config={"quant_method": "x"}), "quantized"),
    "wider texts": ("sd1", changed("text_encoder", hidden_size=64), "the text encoders give 64"),
    "other sizes": ("sdxl", changed("unet", addition_time_embed_dim=4), "not 32 and 6 sizes"),
    "sizes that are words": ("sdxl", changed("unet", addition_time_embed_dim="8"), "not 32 and 6 sizes"),
    "a config of another shape": (
        "sd1",
        changed("text_encoder", intermediate_size=40),
        r"fc1.bias has the shape \[37\] where \[40\]",
    ),
    "more layers than weights": ("sd1", changed("unet", layers_per_block=2), "is not complete. It lacks"),
    "fewer layers than weights": ("sd2", changed("vae", layers_per_block=0), "no place for"),
    "blocks that do not match": ("sd1", changed("unet", down_block_types=["DownBlock2D"]), "not usable"),
    "an unknown block": ("sd1", changed("unet", mid_block_type="Mid"), "unet is not usable: unknown mid"),
    "an unknown activation": (
        "sd1",
        changed("text_encoder", hidden_act="bang"),
        "text_encoder is not usable",
    ),
    "words for numbers": ("sd1", changed("text_encoder", hidden_size="32"), "text_encoder is not usable"),
    "no groups": ("sd1", changed("vae", norm_num_groups=0), "vae is not usable"),
    "a billion layers": ("sd1", changed("unet", layers_per_block=10**9), "layers_per_block is 1000000000"),
    "layers in lists": (
        "sd1",
        changed("unet", transformer_layers_per_block=[[1, [1000]], 1]),
        "transformer_layers_per_block",
    ),
    "a thousand text layers": (
        "sd1",
        changed("text_encoder", num_hidden_layers=1000),
        "num_hidden_layers is 1000",
    ),
    "a thousand blocks": ("sd1", changed("unet", block_out_channels=[8] * 1000), "block_out_channels"),
    "a huge side": ("sd1", changed("unet", cross_attention_dim=10**30), "cross_attention_dim"),
    "a negative side": ("sd1", changed("text_encoder", hidden_size=-32), "hidden_size is -32"),
    "a first layer lost": ("sd1", first_layer_lost, "unet is not complete. It lacks conv_in.bias"),
    "a tensor too many": (
        "sd1",
        reweighted("unet", lambda tensors: {"extra": torch.ones(1)}),
        "no place for extra",
    ),
    "not a number": (
        "sd1",
        reweighted("vae", lambda tensors: {"quant_conv.bias": torch.full((8,), math.nan)}),
        "not finite numbers, in quant_conv.bias",
    ),
    "a config that is a list": ("sd1", lambda at: text(at, "unet/config.json", "[]"), "is not an object"),
    "a config that is no JSON": ("sd1", lambda at: text(at, "vae/config.json", "{"), "is not JSON"),
    "a deep config": ("sd1", lambda at: text(at, "vae/config.json", "[" * 99_999), "is not JSON"),
    "a long config": ("sd1", lambda at: text(at, "vae/config.json", " " * 300_000), "larger than"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_usable_is_refused_in_a_sentence(
    case: str, copy: Callable[[Kind], Path]
) -> None:
    kind, damage, fault = REFUSED[case]
    folder = copy(kind)
    damage(folder)
    with pytest.raises(AssetError, match=fault):
        load(folder)


def test_folders_of_other_models_are_refused_by_name(flux_folder: Path, tmp_path: Path) -> None:
    assert "not a Stable Diffusion model: it is a FluxPipeline" in refusal(flux_folder)
    assert "no unet/config.json" in refusal(zoo.locate("sdxl-canny", flux_folder.parent))
    assert "There is no model at" in refusal(tmp_path / "nothing")


def test_numbers_that_float16_cannot_hold_are_refused(copy: Callable[[Kind], Path]) -> None:
    folder = copy("sd1")
    reweighted("unet", lambda tensors: {"conv_in.bias": torch.full((8,), 1e6)})(folder)
    load(folder)
    assert "not finite" in refusal(folder, dtype=torch.float16)


# refusals of files


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(1) for name in names}


FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "a LoRA": (named("lora_unet_down_blocks_0.lora_down.weight"), "it is a LoRA"),
    "peft's LoRA": (named("unet.mid_block.attn.to_q.lora_A.weight"), "it is a LoRA"),
    "FLUX": (named("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "it is a FLUX model"),
    "SD3": (named("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "a ControlNet": (named("control_model.input_blocks.0.0.weight"), "it is a ControlNet"),
    "an IP adapter": (named("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "it is an IP adapter"),
    "an embedding": (named("emb_params"), "it is an embedding"),
    "SDXL's embedding": (named("clip_g", "clip_l"), "it is an embedding"),
    "a VAE": (named("encoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"), "it is a VAE"),
    "a UNet": (named("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), "it is a UNet"),
    "something": (named("weight"), "what it has is weight"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_other_kinds_are_refused_by_what_they_are(case: str, tmp_path: Path) -> None:
    tensors, expected = FOREIGN[case]
    save_file(tensors, tmp_path / "file")
    assert expected in refusal(tmp_path / "file")


def test_a_controlnet_of_diffusers_is_refused_as_one(folders: dict[Kind, Path]) -> None:
    canny = zoo.locate("sdxl-canny", folders["sdxl"].parent)
    assert "it is a ControlNet" in refusal(canny / "diffusion_pytorch_model.safetensors")


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
SPOILT: dict[str, tuple[Kind, dict[str, Tensor | None], str]] = {
    "inpainting": ("sd1", {FIRST: torch.ones(8, 9, 3, 3)}, "an inpainting model"),
    "a scalar for a layer": ("sd1", {FIRST: torch.tensor(1.0)}, "with None input channels"),
    "Playground 2.5": ("sdxl", {"edm_mean": torch.ones(4)}, "EDM's noise"),
    "no sizes": ("sdxl", {"model.diffusion_model.label_emb.0.0.weight": None}, "'label_emb.0.0.weight'"),
    "a layer less": (
        "sd1",
        {"model.diffusion_model.out.2.bias": None},
        "unet is not complete. It lacks conv_out.bias",
    ),
    "a layer more": (
        "sd1",
        {"model.diffusion_model.input_blocks.4.0.in_layers.0.weight": torch.ones(8)},
        "unet has no place for",
    ),
    "a layer where nobody looks": (
        "sd1",
        {"model.diffusion_model.input_blocks.9.0.in_layers.0.weight": torch.ones(8)},
        "no place for model.diffusion_model.input_blocks.9.0.in_layers.0.weight",
    ),
    "another shape": (
        "sd2",
        {"first_stage_model.quant_conv.bias": torch.ones(16)},
        r"quant_conv.bias has the shape \[16\] where \[8\]",
    ),
    "a text encoder cut": (
        "sd2",
        {"cond_stage_model.model.ln_final.bias": None},
        "text_encoder is not complete. It lacks final_layer_norm.bias",
    ),
    "a flat projection": (
        "sd2",
        {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": torch.tensor(1.0)},
        "in an unknown form",
    ),
    "integers": (
        "sd1",
        {"first_stage_model.quant_conv.bias": torch.ones(8, dtype=torch.int8)},
        "stored as I8",
    ),
    "infinite": (
        "sd1",
        {"first_stage_model.quant_conv.bias": torch.full((8,), math.inf)},
        "not finite numbers, in quant_conv.bias",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_is_not_usable_is_refused_in_a_sentence(
    case: str, files: dict[Kind, Path], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    kind, changes, fault = SPOILT[case]
    tensors: dict[str, Tensor | None] = {**load_file(files[kind]), **changes}
    save_file({name: each for name, each in tensors.items() if each is not None}, tmp_path / "file")
    with pytest.raises(AssetError, match=fault):
        load(tmp_path / "file", configs=folders)


@pytest.mark.parametrize(
    ("prefix", "fault"),
    [
        ("first_stage_model.", "lacks the model's vae: no name in it begins with first_stage_model."),
        ("cond_stage_model.", "has a UNet, but not the text encoders"),
        ("model.diffusion_model.", "what it has is"),
    ],
)
def test_a_file_without_a_component_is_refused(
    prefix: str, fault: str, files: dict[Kind, Path], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    tensors = {name: each for name, each in load_file(files["sd1"]).items() if not name.startswith(prefix)}
    save_file(tensors, tmp_path / "file")
    assert fault in refusal(tmp_path / "file", configs=folders)


def test_the_refiners_file_is_refused_by_name(files: dict[Kind, Path], tmp_path: Path) -> None:
    tensors = {
        name.replace("embedders.1.", "embedders.0."): each
        for name, each in load_file(files["sdxl"]).items()
        if "embedders.0." not in name
    }
    save_file(tensors, tmp_path / "file")
    assert "SDXL's refiner" in refusal(tmp_path / "file")


# the network


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No cache, and a machine on which nothing can be reached. Returns the cache's folder."""

    def unreachable(*arguments: Any) -> Any:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", KINDS)
def test_local_models_never_reach_for_the_network(
    kind: Kind,
    offline: Path,
    folders: dict[Kind, Path],
    files: dict[Kind, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where the Hub's client is free to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load(folders[kind])
    load(files[kind], configs=folders, unet=folders[kind])
    assert "The model's unet" in refusal(files[kind])  # by the shipped configs, which it does not fit
    assert not offline.exists()


def cache(offline: Path, folder: Path, repo: str) -> None:
    """Put a folder where the Hub's client keeps a repository's newest commit."""
    place = offline / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "0123abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abc")


NAMES_BY_VARIANT = {
    None: ["model.safetensors", "model-00001-of-00002.safetensors"],
    "fp16": [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model-00001-of-00002.fp16.safetensors",
    ],
    "non_ema": ["model.non_ema.safetensors"],
}
NEVER_READ = ["model.bin", "model.fp16.bin", "pytorch_model.bin", "model.safetensors.index.json", "model.py"]


@pytest.mark.parametrize("variant", NAMES_BY_VARIANT)
def test_what_is_fetched_is_what_is_read(variant: str | None, tmp_path: Path) -> None:
    everything = [name for names in NAMES_BY_VARIANT.values() for name in names] + NEVER_READ
    for name in everything:
        (tmp_path / name).touch()
    wanted = set(NAMES_BY_VARIANT[variant])
    patterns = repository._patterns(["text_encoder"], variant)
    fetched = {name for name in everything if any(fnmatch(f"text_encoder/{name}", each) for each in patterns)}
    assert fetched == {path.name for path in repository.weights(tmp_path)[variant]} == wanted


def test_a_hub_id_loads_from_the_cache(
    offline: Path, folders: dict[Kind, Path], models: dict[Kind, Parts]
) -> None:
    cache(offline, folders["sdxl"], "somebody/sdxl")
    assert_same(load("somebody/sdxl"), models["sdxl"])


def test_a_hub_ids_variant_loads_from_the_cache(offline: Path, half: Path) -> None:
    cache(offline, half, "somebody/half")
    assert load("somebody/half", variant="fp16").kind == "sd1"
    assert "it has fp16" in refusal("somebody/half", variant="ema")
    assert "is not a word" in refusal("somebody/half", variant="*")


@pytest.mark.parametrize("repo", ["nobody/nothing", "no id at all", "../etc", "a/b/c/d"])
def test_what_the_hub_does_not_have_is_a_failed_download(repo: str, offline: Path) -> None:
    with pytest.raises(AssetError) as caught:
        load(repo)
    assert caught.value.kind == "file_download_error"
    assert repo in caught.value.message
