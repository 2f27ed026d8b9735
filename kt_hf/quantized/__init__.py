"""Expert weights quantized once and saved, to be loaded without the original ones: `kt-hf quantize`, `kt_weight_path`.

A folder holds `layer_0000/_numa_0/INT8_gate_0_…_.kt` and so on, what the operators write and read, and a manifest. The
operators look at names and sizes alone, and only when they load a layer. Here it is checked before, and more: that the
files are those written (contents as each layer is loaded), and that they were made of this model's weights.
"""

from .folder import PrequantizedExperts, for_run, open_saved
from .manifest import MANIFEST, Manifest
from .write import bytes_on_disk, quantize

# The names that these had in 0.1.0.
SavedExperts, quantise = PrequantizedExperts, quantize

__all__ = [
    "MANIFEST",
    "Manifest",
    "PrequantizedExperts",
    "SavedExperts",
    "bytes_on_disk",
    "for_run",
    "open_saved",
    "quantise",
    "quantize",
]
