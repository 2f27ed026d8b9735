"""One PyTorch thread for all of them."""

from tests.helpers import one_torch_thread as one_torch_thread
