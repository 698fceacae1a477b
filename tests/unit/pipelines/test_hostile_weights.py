"""Weights and configs made to harm, in the hands of those that load them: a 422 that names the field."""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from pipelines.adapters import tensor_file
from pipelines.flux.flux_general_rf_inversion import Pipeline as FluxPipeline
from pipelines.flux.model import FluxModel
from schemas.errors import AssetError, InputError
from tests.support import gadgets
from tests.support.rf_inversion import prepare, request
from tests.support.tensor_attacks import LARGE
from tests.support.universal import START, Files, Studio, blocks

Fields = dict[str, Any]
MB = 1 << 20


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {"net": made.controlnet(), "ip": made.ip_adapter(), "encoder": made.encoder()}
    return made


NET = {"path": "net", "image_url": START}
IP = {"path": "ip", "ip_adapter_image_url": START}

# every field of the universal endpoint that names weights, with the file "bad" in it
UNIVERSAL: dict[str, Fields] = {
    "model_name": {"model_name": "bad"},
    "unet_name": {"unet_name": "bad"},
    "loras.0.path": {"loras": [{"path": "bad"}]},
    "embeddings.0.path": {"embeddings": [{"path": "bad"}]},
    "controlnets.0.path": {"controlnets": [NET | {"path": "bad"}]},
    "ip_adapter.0.path": {"ip_adapter": [IP | {"path": "bad"}], "image_encoder_path": "encoder"},
    "image_encoder_path": {"ip_adapter": [IP], "image_encoder_path": "bad"},
    "ic_light_model_url": {"ic_light_model_url": "bad", "ic_light_image_url": START},
}
PICTURE = "http://pictures/control.png"
# and those of rf-inversion
FLUX: dict[str, Fields] = {
    "loras.0.path": {"loras": [{"path": "bad"}]},
    "control_loras.0.path": {"control_loras": [{"path": "bad", "control_image_url": PICTURE}]},
    "controlnets.0.path": {"controlnets": [{"path": "bad", "control_image_url": PICTURE}]},
    "controlnet_unions.0.path": {
        "controlnet_unions": [
            {"path": "bad", "controls": [{"control_image_url": PICTURE, "control_mode": "canny"}]}
        ]
    },
    "easycontrols.0.control_method_url": {
        "easycontrols": [{"control_method_url": "bad", "image_url": PICTURE, "image_control_type": "spatial"}]
    },
}


def refused(call: Callable[[], object]) -> tuple[str, str, str]:
    """The field, the word and the sentence of a refusal that names one field."""
    with pytest.raises(InputError) as raised:
        call()
    [fault] = raised.value.fields
    assert raised.value.status == 422 and len(fault.msg) < 1500
    return ".".join(map(str, fault.loc[1:])), fault.type, fault.msg


def by_field(studio: Studio, flux: FluxModel, path: Path) -> list[tuple[str, tuple[str, str, str]]]:
    """What each field says of a file."""
    told = []
    for field, fields in UNIVERSAL.items():
        told.append((field, refused(partial(studio.prepare, {"bad": path}, **fields))))
    files: Files = {PICTURE: blocks(3), "bad": path}
    for field, fields in FLUX.items():
        wish = request(**fields)
        told.append((field, refused(partial(prepare, FluxPipeline(flux), blocks(0), wish, files))))
    assert studio.model.adapters.pins == 0 and flux._bank.pins == 0
    return told


def copied(folder: Path, to: Path) -> Path:
    """The same files in a folder of its own."""
    for path in folder.rglob("*"):
        if path.is_file():
            there = to / path.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.symlink_to(path)
    return to


# -- row 12 of the threat model: what a pickle would run


@pytest.mark.parametrize("name", sorted(gadgets.files(Path("canary"))))
def test_t12_no_file_that_a_field_names_is_unpickled(
    name: str, studio: Studio, flux: FluxModel, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    data = gadgets.files(canary)[name]
    path = tmp_path / "0123.safetensors"  # so the cache calls what it has
    path.write_bytes(data)
    operators = tmp_path / name  # so an operator may call one
    operators.write_bytes(data)
    with gadgets.unpickled() as seen:
        for each in {path, operators}:
            for field, (told, kind, _) in by_field(studio, flux, each):
                assert (told, kind) == (field, "invalid_weights")
    assert seen == [] and not canary.exists()


PLACES = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("place", PLACES)
def test_t12_a_models_folder_is_refused_if_a_part_is_a_pickle(
    place: str, studio: Studio, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    files = gadgets.files(canary)
    with gadgets.unpickled() as seen:
        for name, ending in (("pickle.safetensors", ".safetensors"), ("model.pt", ".bin")):
            folder = copied(studio.folders["sd15"], tmp_path / f"{place}{ending}")
            [weights] = (folder / place).glob("*.safetensors")
            weights.unlink()
            weights.with_suffix(ending).write_bytes(files[name])
            told = refused(partial(studio.prepare, {"bad": folder}, model_name="bad"))
            assert told[:2] == ("model_name", "invalid_weights")
    assert seen == [] and not canary.exists()


# -- row 13: safetensors made to harm; test_tensor_file has more of them


@pytest.mark.parametrize("name", LARGE)
def test_t13_a_header_made_to_harm_is_refused_at_little_cost(
    name: str, studio: Studio, flux: FluxModel, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(LARGE[name][0]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = time.thread_time()
    with pytest.raises(AssetError):
        tensor_file.read(path)
    assert time.thread_time() - spent < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * MB
    for field, (told, kind, _) in by_field(studio, flux, path):
        assert (told, kind) == (field, "invalid_weights")


@pytest.mark.parametrize("rank", [1000, 100_000])
def test_t13_a_lora_of_a_huge_rank_is_refused(
    rank: int, studio: Studio, flux: FluxModel, tmp_path: Path
) -> None:
    """More than the model has room for, or more than the layer has rows."""
    with studio.base("sd15") as base:
        layer, (rows, columns, *_) = next(
            (layer, shape) for layer, shape in base.targets.items() if layer.endswith("to_q")
        )
    path = tmp_path / "rank.safetensors"
    save_file(
        {
            f"{layer}.lora_A.weight": torch.ones(rank, columns),
            f"{layer}.lora_B.weight": torch.ones(rows, rank),
        },
        path,
    )
    field, _, sentence = refused(lambda: studio.prepare({"bad": path}, loras=[{"path": "bad"}]))
    assert field.startswith("loras") and "rank" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_t13_weights_that_are_no_numbers_never_make_a_picture(
    value: float, studio: Studio, flux: FluxModel, tmp_path: Path
) -> None:
    """One number in a file that would fit is enough."""
    good: dict[str, Path] = {
        "loras.0.path": studio.lora(),
        "embeddings.0.path": studio.embedding(),
        "controlnets.0.path": studio.controlnet(),
        "ip_adapter.0.path": studio.ip_adapter(),
        "ic_light_model_url": studio.offsets(8),
    }
    for field, path in good.items():
        tensors = tensor_file.read(path).load()
        name = sorted(tensors)[len(tensors) // 2]
        tensors[name].view(-1)[0] = value
        bad = tmp_path / f"{field}.safetensors"
        bad.write_bytes(save(tensors))
        told, kind, sentence = refused(partial(studio.prepare, {"bad": bad}, **UNIVERSAL[field]))
        assert (told, kind) == (field, "invalid_weights") and "not finite" in sentence


@pytest.mark.parametrize(
    ("field", "part"), [("model_name", "unet"), ("unet_name", "unet"), ("model_name", "vae")]
)
def test_t13_a_model_of_values_that_are_no_numbers_is_refused(
    field: str, part: str, studio: Studio, tmp_path: Path
) -> None:
    folder = copied(studio.folders["sd15"], tmp_path / "model")
    [weights] = (folder / part).glob("*.safetensors")
    tensors = tensor_file.read(weights).load()
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    weights.unlink()
    weights.write_bytes(save(tensors))
    told, kind, sentence = refused(lambda: studio.prepare({"bad": folder}, **UNIVERSAL[field]))
    assert (told, kind) == (field, "invalid_weights") and "not finite" in sentence


# -- row 14: configs made to harm


def config(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


CONFIGS: dict[str, bytes] = {
    "auto_map": config(auto_map={"AutoModel": "evil.Model", "AutoConfig": "ann/evil--configuration.Config"}),
    "auto_map to an absent module": config(auto_map={"ControlNetModel": "colorsys.Evil"}),
    "trust_remote_code": config(trust_remote_code=True),
    "an implementation of attention": config(attn_implementation="colorsys/kernel:run"),
    "architectures": config(architectures=["colorsys.Evil"]),
    "a class of another library": config(_class_name="colorsys.ControlNetModel"),
    "a class of another kind": config(_class_name="UNet2DConditionModel"),
    "a class by its place": config(_class_name=["diffusers_modules.evil", "Evil"]),
    "a custom pipeline": config(custom_pipeline="ann/evil"),
    "an activation by its place": config(act_fn="colorsys.rgb_to_hls"),
    "a quantiser": config(quantization_config={"quant_method": "colorsys", "modules_to_not_convert": ["x"]}),
    "a processor": config(attn_processor="colorsys.Processor"),
    "a type by its place": config(torch_dtype="colorsys.float"),
    "an object of Python's": b'{"in_channels": {"py/object": "colorsys.Evil"}}',
    "a reference": b'{"$ref": "file:///etc/passwd"}',
    "a width of 2^31": config(in_channels=2**31),
    "a width of 10^300": b'{"in_channels": 1' + b"0" * 300 + b"}",
    "a billion layers": config(layers_per_block=10**9, num_layers=10**9),
    "a negative width": config(in_channels=-4, attention_head_dim=-1),
    "many blocks": config(block_out_channels=[320] * 5000, axes_dims_rope=[2] * 5000),
    "a fraction": config(in_channels=4.5),
    "NaN": b'{"in_channels": NaN}',
    "Infinity": b'{"in_channels": -Infinity}',
    "null": b"null",
    "a list": b"[]",
    "text": b'"ControlNetModel"',
    "YAML": b"!!python/object/apply:os.system ['true']",
    "a pickle": b"\x80\x04K\x01.",
    "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>',
    "deep objects": b'{"a":' * 10_000,
    "deep objects that end": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a value that is deep": b'{"in_channels":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "UTF-16": '{"auto_map": {}}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a surrogate": b'{"in_channels": "\\ud800"}',
    "a NUL": b'{"in_channels\\u0000": 4}',
}


def fields_with_configs() -> list[tuple[str, str]]:
    return [("universal", name) for name in CONFIGS] + [("flux", name) for name in CONFIGS]


@pytest.mark.parametrize(("endpoint", "name"), fields_with_configs())
def test_t14_a_config_made_to_harm_is_refused_and_imports_nothing(
    endpoint: str, name: str, studio: Studio, flux: FluxModel
) -> None:
    def send() -> object:
        if endpoint == "universal":
            return studio.prepare(files, controlnets=[NET | {"config_url": "config"}])
        net = {"path": "net", "config_url": "config", "control_image_url": PICTURE}
        return prepare(FluxPipeline(flux), blocks(0), request(controlnets=[net]), files)

    files = {"config": CONFIGS[name], "net": studio.files["net"], PICTURE: blocks(3)}
    with gadgets.unpickled() as seen:
        before = set(sys.modules)
        field, kind, sentence = refused(send)
        assert set(sys.modules) - before == set()
    assert (field, kind) == ("controlnets.0.config_url", "invalid_config")
    assert len(sentence) < 300 and seen == []


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "_auto_class", "_name_or_path", "__reduce__"]
)
def test_t14_what_diffusers_only_notes_is_not_looked_at(key: str, studio: Studio) -> None:
    """Keys with a line before them are no arguments: such a config acts as one without."""
    files = {"config": config(**{key: "colorsys.Evil"}), "net": studio.files["net"]}
    before = set(sys.modules)
    field, kind, _ = refused(lambda: studio.prepare(files, controlnets=[NET | {"config_url": "config"}]))
    assert (field, kind) == ("controlnets.0.config_url", "invalid_config")  # its widths are not this net's
    assert "colorsys" not in set(sys.modules) - before
