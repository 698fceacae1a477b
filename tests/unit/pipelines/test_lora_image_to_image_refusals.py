"""lora/image-to-image: what cannot be is refused with the path of the field, and nothing stays held."""

import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.gateway.validation import validate
from pipelines import zoo
from pipelines.sd import lora_image_to_image
from schemas.endpoints.lora_image_to_image import Input
from schemas.errors import InputError
from schemas.settings import Limits
from tests.support.sd_controlnets import write
from tests.support.universal import START, Studio

Fields = dict[str, Any]

NET = {"path": "net", "image_url": START}
IP = {"path": "ip", "ip_adapter_image_url": START}
FACE = {"path": "faceid", "ip_adapter_image_url": START, "insight_face_model_path": "ann"}
LIGHT = {"ic_light_model_url": "light", "ic_light_image_url": START}


def array(*values: float) -> Fields:
    return {"method": "array", "array": list(values)}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # both arrays
        ({"timesteps": array(900, 1), "sigmas": array(9, 0)}, "sigmas value_error"),
        ({"timesteps": array(*range(200, 0, -1))}, "timesteps.array too_long"),
        ({"timesteps": array(9.5)}, "timesteps.array.0 int_from_float"),
        ({"timesteps": {"method": "some"}}, "timesteps.method literal_error"),
        # one embedding
        ({"embeddings": [{"path": "a"}, {"path": "b"}]}, "embeddings too_long"),
        ({"embeddings": [{"path": "a", "tokens": []}]}, "embeddings.0.tokens too_short"),
        ({"embeddings": [{"tokens": ["x"]}]}, "embeddings.0.path missing"),
        # windows that end before they begin
        (
            {"controlnets": [NET, NET | {"start_percentage": 0.5, "end_percentage": 0.5}]},
            "controlnets.1.start_percentage less_than",
        ),
        ({"controlnets": [NET | {"start_percentage": 1}]}, "controlnets.0.start_percentage less_than"),
        (
            {"controlnets": [NET | {"conditioning_scale": 2.1}]},
            "controlnets.0.conditioning_scale less_than_equal",
        ),
        ({"controlnets": [{"path": "net"}]}, "controlnets.0.image_url missing"),
        ({"controlnets": [NET | {"variant": "../x"}]}, "controlnets.0.variant string_pattern_mismatch"),
        # an adapter that is not there
        ({"controlnets": [NET | {"ip_adapter_index": 0}]}, "controlnets.0.ip_adapter_index less_than"),
        (
            {"controlnets": [NET | {"ip_adapter_index": 1}], "ip_adapter": [IP]},
            "controlnets.0.ip_adapter_index less_than",
        ),
        (
            {"controlnets": [NET | {"ip_adapter_index": -1}], "ip_adapter": [IP]},
            "controlnets.0.ip_adapter_index greater_than_equal",
        ),
        # adapters
        ({"ip_adapter": [{"path": "ip"}]}, "ip_adapter.0.ip_adapter_image_url missing"),
        ({"ip_adapter": [IP | {"ip_adapter_image_url": []}]}, "ip_adapter.0.ip_adapter_image_url too_short"),
        ({"ip_adapter": [IP | {"ip_adapter_image_url": 7}]}, "ip_adapter.0.ip_adapter_image_url string_type"),
        ({"ip_adapter": [IP | {"scale": -1}]}, "ip_adapter.0.scale greater_than_equal"),
        (
            {"ip_adapter": [FACE | {"ip_adapter_image_url": [START, START]}]},
            "ip_adapter.0.ip_adapter_image_url too_long",
        ),
        (
            {"ip_adapter": [IP | {"unconditional_noising_factor": 1.1}]},
            "ip_adapter.0.unconditional_noising_factor less_than_equal",
        ),
        # places in repositories
        ({"image_encoder_subfolder": "enc"}, "image_encoder_subfolder value_error"),
        ({"image_encoder_weight_name": "../x"}, "image_encoder_weight_name string_pattern_mismatch"),
        ({"image_encoder_weight_name": "a/x"}, "image_encoder_weight_name string_pattern_mismatch"),
        ({"variant": "../fp16"}, "variant string_pattern_mismatch"),
        # light
        ({"ic_light_model_url": "light"}, "ic_light_image_url missing"),
        ({"ic_light_image_url": START}, "ic_light_image_url value_error"),
        ({"ic_light_model_background_image_url": START}, "ic_light_model_background_image_url value_error"),
        # numbers and names
        ({"scheduler": "Heun"}, "scheduler literal_error"),
        ({"scheduler": "DPM++ 2M SDE "}, "scheduler literal_error"),
        ({"clip_skip": 3}, "clip_skip less_than_equal"),
        ({"loras": [{"path": "a", "scale": 4.5}]}, "loras.0.scale less_than_equal"),
        ({"loras": [{"path": "a", "scale": -1}]}, "loras.0.scale greater_than_equal"),
        ({"tile_width": 64}, "tile_width greater_than_equal"),
        ({"image_format": "webp"}, "image_format literal_error"),
        ({"model_name": None}, "model_name missing"),
        ({"model_name": ""}, "model_name string_too_short"),
    ],
)
def test_a_request_is_refused_before_a_file_is_looked_for(fields: Fields, expected: str) -> None:
    with pytest.raises(InputError) as raised:
        validate(Input, {"model_name": "m", "prompt": "x"} | fields, Limits())
    assert [_told(each) for each in raised.value.fields] == [expected]


@pytest.mark.parametrize("place", ["../x", "..", "a/../../x", "a/..", "/etc", "a//b", "./../x", ". ./x", "."])
def test_a_place_in_a_repository_leads_nowhere_else(place: str) -> None:
    adapter = [IP | {"model_subfolder": place}, IP | {"weight_name": place}]
    encoder = {"image_encoder_subfolder": place, "image_encoder_weight_name": place}
    fields = {"ip_adapter": adapter, "image_encoder_path": "encoder", **encoder}
    with pytest.raises(InputError) as raised:
        validate(Input, {"model_name": "m", "prompt": "x"} | fields, Limits())
    assert [_told(each) for each in raised.value.fields] == [
        "ip_adapter.0.model_subfolder string_pattern_mismatch",
        "ip_adapter.1.weight_name string_pattern_mismatch",
        "image_encoder_subfolder string_pattern_mismatch",
        "image_encoder_weight_name string_pattern_mismatch",
    ]


@pytest.mark.parametrize("place", ["models", "./models", "models/", "a/b c/d-e_f.g", "v1..2", ".hidden"])
def test_a_place_in_a_repository_may_be_written_in_many_ways(place: str) -> None:
    adapter = IP | {"model_subfolder": place, "weight_name": "ip-adapter_sd15.bin"}
    validate(Input, {"model_name": "m", "prompt": "x", "ip_adapter": [adapter]}, Limits())


def _told(fault: Any) -> str:
    assert fault.loc[0] == "body" and fault.msg
    return f"{'.'.join(map(str, fault.loc[1:]))} {fault.type}"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {"net": made.controlnet(), "net-sdxl": made.controlnet(name="sdxl")}
    made.files |= {"ip": made.ip_adapter(), "ip-sdxl": made.ip_adapter(name="sdxl")}
    made.files |= {"faceid": made.ip_adapter("faceid"), "plus": made.ip_adapter("plus")}
    made.files |= {"encoder": made.encoder(), "narrow": made.encoder(projection_dim=12)}
    made.files |= {"light": made.offsets(8), "light and back": made.offsets(12)}
    made.files |= {
        "lora": made.lora(),
        "lora-sdxl": made.lora(name="sdxl"),
        "lora-sd2": made.lora(name="sd2"),
    }
    made.files |= {f"words-{name}": made.embedding("q w", name) for name in ("sd15", "sd2", "sdxl")}
    made.files |= {"flux": zoo.locate("flux", made.root / "zoo"), "one word": made.embedding("q")}
    made.files |= {"absent": made.root / "absent", "empty": made.root / "empty"}
    made.files["empty"].mkdir()
    made.files |= {"odd size": made.files[START].resize((95, 64)), "config": b"{"}
    made.files |= {"unet-sdxl": made.folders["sdxl"] / "unet", "net config": b'{"cross_attention_dim": 7}'}
    # what a .bin or .ckpt holds, under any name
    made.files["pickle"] = made.root / "pickle.safetensors"
    made.files["pickle"].write_bytes(pickle.dumps({"state_dict": [1, 2]}))
    made.files["checkpoint"] = made.root / "checkpoint.ckpt"
    torch.save({"weight": torch.zeros(2)}, made.files["checkpoint"])
    name = "transformer.transformer_blocks.0.attn.to_q"
    made.files["lora-flux"] = made.root / "lora-flux.safetensors"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)},
        made.files["lora-flux"],
    )
    broken = {key: tensor.clone() for key, tensor in made.net().state_dict().items()}
    broken["conv_in.weight"][0] = torch.nan
    made.files["not finite"] = write(made.root / "broken.safetensors", broken)
    made.look_for_faces()
    return made


ENCODED: Fields = {"image_encoder_path": "encoder"}
SDXL: Fields = {"model_name": "sdxl"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # models
        ({"model_name": "flux"}, "model_name invalid_weights"),
        ({"model_name": "absent"}, "model_name invalid_weights"),
        ({"model_name": "empty"}, "model_name invalid_weights"),
        ({"model_name": "lora"}, "model_name invalid_weights"),
        ({"model_name": "pickle"}, "model_name invalid_weights"),
        ({"model_name": "checkpoint"}, "model_name invalid_weights"),
        ({"variant": "fp16"}, "model_name invalid_weights"),
        ({"unet_name": "unet-sdxl"}, "unet_name invalid_weights"),
        ({"unet_name": "sdxl"}, "unet_name invalid_weights"),
        ({"unet_name": "flux"}, "unet_name invalid_weights"),
        ({"unet_name": "net"}, "unet_name invalid_weights"),
        ({"unet_name": "pickle"}, "unet_name invalid_weights"),
        # LoRAs
        ({"loras": [{"path": "lora"}, {"path": "lora-sdxl"}]}, "loras.1.path invalid_weights"),
        ({"loras": [{"path": "lora-flux"}]}, "loras.0.path invalid_weights"),
        ({"loras": [{"path": "lora-flux", "scale": 0}]}, "loras.0.path invalid_weights"),
        ({"loras": [{"path": "lora"}], **SDXL}, "loras.0.path invalid_weights"),
        ({"loras": [{"path": "checkpoint"}]}, "loras.0.path invalid_weights"),
        ({"loras": [{"path": "net"}]}, "loras.0.path invalid_weights"),
        # embeddings
        ({"embeddings": [{"path": "words-sd2"}]}, "embeddings.0.path invalid_weights"),
        ({"embeddings": [{"path": "words-sdxl"}]}, "embeddings.0.path invalid_weights"),
        ({"embeddings": [{"path": "words-sd15"}], **SDXL}, "embeddings.0.path invalid_weights"),
        ({"embeddings": [{"path": "one word"}]}, "embeddings.0.path invalid_weights"),  # for two tokens
        ({"embeddings": [{"path": "words-sd15", "tokens": ["a"]}]}, "embeddings.0.path invalid_weights"),
        ({"embeddings": [{"path": "pickle"}]}, "embeddings.0.path invalid_weights"),
        ({"embeddings": [{"path": "lora"}]}, "embeddings.0.path invalid_weights"),
        # ControlNets
        ({"controlnets": [NET, NET | {"path": "net-sdxl"}]}, "controlnets.1.path invalid_weights"),
        ({"controlnets": [NET], **SDXL}, "controlnets.0.path invalid_weights"),
        ({"controlnets": [NET | {"path": "lora"}]}, "controlnets.0.path invalid_weights"),
        ({"controlnets": [NET | {"path": "checkpoint"}]}, "controlnets.0.path invalid_weights"),
        ({"controlnets": [NET | {"path": "not finite"}]}, "controlnets.0.path invalid_weights"),
        ({"controlnets": [NET | {"config_url": "config"}]}, "controlnets.0.config_url invalid_config"),
        ({"controlnets": [NET | {"config_url": "net config"}]}, "controlnets.0.config_url invalid_config"),
        ({"controlnets": [NET | {"mask_url": "square"}]}, "controlnets.0.mask_url image_size_mismatch"),
        ({"controlnets": [NET | {"mask_url": "odd size"}]}, "controlnets.0.mask_url image_size_mismatch"),
        # IP-Adapters
        ({"ip_adapter": [IP]}, "image_encoder_path missing"),
        ({"ip_adapter": [IP | {"path": "ip-sdxl"}], **ENCODED}, "ip_adapter.0.path invalid_weights"),
        ({"ip_adapter": [IP, IP | {"path": "lora"}], **ENCODED}, "ip_adapter.1.path invalid_weights"),
        ({"ip_adapter": [IP | {"path": "pickle"}], **ENCODED}, "ip_adapter.0.path invalid_weights"),
        ({"ip_adapter": [IP], "image_encoder_path": "narrow"}, "image_encoder_path invalid_weights"),
        ({"ip_adapter": [IP], "image_encoder_path": "lora"}, "image_encoder_path invalid_weights"),
        ({"ip_adapter": [IP], "image_encoder_path": "checkpoint"}, "image_encoder_path invalid_weights"),
        (
            {"ip_adapter": [IP | {"ip_adapter_mask_url": "square"}], **ENCODED},
            "ip_adapter.0.ip_adapter_mask_url image_size_mismatch",
        ),
        (
            {
                "ip_adapter": [
                    IP | {"ip_adapter_image_url": [START, "square"], "ip_adapter_mask_url": "left"}
                ],
                **ENCODED,
            },
            "ip_adapter.0.ip_adapter_mask_url image_size_mismatch",
        ),
        (
            {"ip_adapter": [IP | {"scale_json": {"sideways": 1}}], **ENCODED},
            "ip_adapter.0.scale_json invalid_scale",
        ),
        (
            {"ip_adapter": [IP | {"scale_json": {"up": "much"}}], **ENCODED},
            "ip_adapter.0.scale_json invalid_scale",
        ),
        (
            {"ip_adapter": [IP | {"scale_json": {"up": {"block_9": 1}}}], **ENCODED},
            "ip_adapter.0.scale_json invalid_scale",
        ),
        (
            {"ip_adapter": [IP | {"scale_json": {"down": [1, 2, 3]}}], **ENCODED},
            "ip_adapter.0.scale_json invalid_scale",
        ),
        # faces
        (
            {"ip_adapter": [FACE | {"insight_face_model_path": None}]},
            "ip_adapter.0.insight_face_model_path missing",
        ),
        (
            {"ip_adapter": [FACE, FACE | {"insight_face_model_path": "nobody"}]},
            "ip_adapter.1.ip_adapter_image_url face_detection_error",
        ),
        # light
        ({**LIGHT, **SDXL}, "ic_light_model_url invalid_weights"),
        ({**LIGHT, "model_name": "sd2"}, "ic_light_model_url invalid_weights"),
        ({**LIGHT, "ic_light_model_url": "lora"}, "ic_light_model_url invalid_weights"),
        ({**LIGHT, "ic_light_model_url": "pickle"}, "ic_light_model_url invalid_weights"),
        (
            {**LIGHT, "ic_light_model_url": "light and back"},
            "ic_light_model_background_image_url missing",
        ),
        (
            {**LIGHT, "ic_light_model_background_image_url": START},
            "ic_light_model_background_image_url value_error",
        ),
        # schedules
        ({"timesteps": array(900, 1), "scheduler": "Euler A"}, "timesteps value_error"),
        ({"timesteps": array(900, 1), "scheduler": "DPM++ 2M Karras"}, "timesteps value_error"),
        ({"timesteps": array(900, 1)}, "timesteps value_error"),  # the model's own is PNDM
        ({"timesteps": array(1, 900), "scheduler": "Euler"}, "timesteps value_error"),
        ({"timesteps": array(1000), "scheduler": "Euler"}, "timesteps value_error"),
        ({"timesteps": array(5, -1), "scheduler": "Euler"}, "timesteps value_error"),
        ({"sigmas": array(9, 0), "scheduler": "DDIM"}, "sigmas value_error"),
        ({"sigmas": array(9), "scheduler": "Euler"}, "sigmas value_error"),
        ({"sigmas": array(0, 9), "scheduler": "Euler"}, "sigmas value_error"),
        ({"num_inference_steps": 51, "scheduler": "LCM"}, "num_inference_steps less_than_equal"),
        ({"num_inference_steps": 51, "scheduler": "TCD"}, "num_inference_steps less_than_equal"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_its_field(
    studio: Studio, fields: Fields, expected: str
) -> None:
    assert refusal(studio, **fields) == [expected]


@pytest.mark.parametrize("field", ["debug_latents", "debug_per_pass_latents"])
def test_more_than_there_is_memory_for_is_not_kept(
    studio: Studio, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: Fields = {field: True, "num_inference_steps": 10, "num_images": 2, "image_url": "square"}
    nbytes = 3 * 96 * 96 * 10 * 2
    monkeypatch.setattr(lora_image_to_image, "MAX_TRACE_BYTES", nbytes - 1)
    assert refusal(studio, **fields) == [f"{field} too_long"]
    monkeypatch.setattr(lora_image_to_image, "MAX_TRACE_BYTES", nbytes)
    studio.prepare(**fields).resources.close()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"controlnets": [NET], "ip_adapter": [IP], **ENCODED}, "controlnets"),
        ({"ip_adapter": [IP], **ENCODED}, "ip_adapter"),
        (LIGHT, "ic_light_model_url"),
    ],
)
def test_more_than_there_is_room_for_is_refused_by_its_field(
    studio: Studio, fields: Fields, field: str
) -> None:
    tight = Studio(studio.root, adapter_bytes=1000)
    tight.files = studio.files
    assert refusal(tight, **fields) == [f"{field} file_too_large"]


def refusal(studio: Studio, **fields: Any) -> list[str]:
    """What `prepare` says. Nothing stays held."""
    before = studio.model._bases.pins
    with pytest.raises(InputError) as raised:
        studio.prepare(**fields)
    assert (studio.model.adapters.pins, studio.model._bases.pins) == (0, before)
    assert studio.model.base._bank.pins == studio.model.base._text_bank.pins == 0
    return [_told(each) for each in raised.value.fields]
