"""Expert weights quantised once and saved, to be loaded without the original ones: `kt-hf quantize`, `kt_weight_path`.

A folder holds `layer_0000/_numa_0/INT8_gate_0_…_.kt` and so on, what the operators write and read, and a manifest. The
operators check nothing of what they load, so everything is checked here: that the files are those written (names and
sizes at once, contents as each layer is loaded), and that they were made of this model's weights.
"""

from .manifest import MANIFEST, Manifest
from .saved import SavedExperts, for_run, open_saved
from .write import bytes_on_disk, quantise

__all__ = ["MANIFEST", "Manifest", "SavedExperts", "bytes_on_disk", "for_run", "open_saved", "quantise"]
