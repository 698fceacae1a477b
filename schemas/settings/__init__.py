"""Every knob, typed and frozen: the form of the `args` and `user_config` in serve_config.yaml.

An unknown key or a bad value stops the start and is named. Units are in the names.
"""

from schemas.settings.base import Limits, ReachSettings, Settings, local_path
from schemas.settings.catalogue import Catalogue, ModelEntry
from schemas.settings.front import FrontSettings, LeaseSettings, OpenAIModel, Retention, WebhookSettings
from schemas.settings.model import AutoscalingSettings, ModelSettings, SafetyPolicy
from schemas.settings.speed import PictureSize, SpeedSettings
from schemas.settings.weights import EASYCONTROLS, BaseSettings, FetchSettings, WeightSettings

__all__ = [
    "EASYCONTROLS",
    "AutoscalingSettings",
    "BaseSettings",
    "Catalogue",
    "FetchSettings",
    "FrontSettings",
    "LeaseSettings",
    "Limits",
    "ModelEntry",
    "ModelSettings",
    "OpenAIModel",
    "PictureSize",
    "ReachSettings",
    "Retention",
    "SafetyPolicy",
    "Settings",
    "SpeedSettings",
    "WebhookSettings",
    "WeightSettings",
    "local_path",
]
