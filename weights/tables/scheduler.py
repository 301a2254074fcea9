"""The noise schedule of a model: diffusers' `FlowMatchEulerDiscreteScheduler`, a config without weights."""

from __future__ import annotations

from bokehflux.configs import ScheduleConfig

from ..codec import Codec, Field, refused

FILE = "scheduler_config.json"
_OFF = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
        "stochastic_sampling")  # fmt: skip
_UNSUPPORTED = {
    "shift_terminal": None,
    "time_shift_type": "exponential",
    **dict.fromkeys(_OFF, (False, None)),
}

CONFIG = Codec(
    what="flow-matching schedule",
    build=ScheduleConfig,
    fields=(
        Field("dynamic", "use_dynamic_shifting", absent=False),
        Field("shift", "shift", absent=1.0),
        Field("base_tokens", "base_image_seq_len", absent=256),
        Field("max_tokens", "max_image_seq_len", absent=4096),
        Field("base_shift", "base_shift", absent=0.5),
        Field("max_shift", "max_shift", absent=1.15),
    ),
    fixed={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
    faults=lambda config: refused(_UNSUPPORTED, config),
)  # fmt: skip
