"""torch's meta device as it is in a process in which transformers has made no model."""

import pytest
import torch.utils._device


@pytest.fixture(autouse=True)
def whole_meta_device():
    """Let torch list the constructors that obey torch.device anew.

    A model that transformers made before, in another test of this process, may have left
    torch.linspace out of the list (slipway/convert/hf_classes.py).
    """
    torch.utils._device._device_constructors.cache_clear()
