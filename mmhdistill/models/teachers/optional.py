"""Optional libraries, and the Hugging Face hub that both fetch from."""
import importlib
from pathlib import Path
from types import ModuleType

# Cures torchvision, which the libraries import, where it is a CUDA build beside a CPU torch.
from ...compat import apply


def require(library: str, user: str) -> ModuleType:
    """Import ``library``, or say how to install it."""
    apply()
    try:
        return importlib.import_module(library)
    except ImportError as error:
        pins = {'transformers': 'transformers<=4.48.3'}
        raise ImportError(f'{user} needs {library}, which cannot be imported ({error}). Run: pip install '
                          f"'{pins.get(library, library)}'") from error


def from_hub(repository: str, file: str, teacher: str, advice: str) -> Path:
    """Path of a file of the Hugging Face hub: from its cache, else fetched (resumed, locked) by ``huggingface_hub``.

    Args:
        advice: what to do with a file that was fetched elsewhere, for the error.
    """
    hub = require('huggingface_hub', 'fetching from the Hugging Face hub')
    name, _, revision = repository.partition('@')
    try:
        url = hub.hf_hub_url(name, file, revision=revision or None)
    except ValueError as error:
        raise ValueError(f"teacher '{teacher}' asks for '{repository}', which is neither a folder that exists nor a "
                         f'name on the Hugging Face hub, such as facebook/dinov2-base ({error}).') from error
    try:
        return Path(hub.hf_hub_download(name, file, revision=revision or None))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"{file} of teacher '{teacher}' cannot be fetched from {url} ({reason}). Without a "
                           f"network, fetch {file} elsewhere and {advice}; the hub keeps its files in "
                           f'{hub.constants.HF_HUB_CACHE}.') from error
