"""The modelling files that an exported Hugging Face folder carries, for ``trust_remote_code=True``.

They need torch and transformers (5.0 or newer) and nothing of this package: an export carries each module of
:data:`SHARED`, the formulas that this package uses itself, in place of the file here that re-exports it.
"""

from types import ModuleType

from monet_train.kernels import plain
from monet_train.model import rotary, statistics

OWN = ("configuration_monet.py", "modeling_monet.py")
SHARED: dict[str, ModuleType] = {  # by the file's name in an export; torch is all that they import
    "monet_plain.py": plain,
    "monet_rotary.py": rotary,
    "monet_statistics.py": statistics,
}
