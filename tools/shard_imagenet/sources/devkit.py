"""Classes of ImageNet's validation images, which their tar does not hold: from the devkit or a text file."""

import io
import tarfile
import zlib
from dataclasses import dataclass

from crisp.errors import CrispError
from crisp.shard_imagenet.sources.wanted import read_text
from crisp.storage import Location

_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"
_MEMBER_MAX = 64 * 1024 * 1024  # the real ones have less than 1 MB


@dataclass(frozen=True, slots=True)
class ValLabels:
    """WordNet ids of the validation images."""

    where: str
    wordnet_ids: tuple[str, ...]
    """Per image, in the order of the sorted names"""
    classes: tuple[str, ...]
    """All classes there are, also those without a validation image; sorted"""


def read_val_labels(where: str) -> ValLabels:
    """From the devkit (tar.gz), or a text file with one WordNet id per line.

    Raises:
        CrispError: it is neither, or damaged; scipy is not installed, which the devkit's meta.mat needs.
    """
    if where.endswith((".tar.gz", ".tgz")):
        return _from_devkit(where)
    lines = read_text(where, "--labels").split("\n")
    wordnet_ids = []
    for number, line in enumerate(lines, start=1):
        if len(words := line.split()) > 1 or "," in line:
            raise CrispError(f"{where}, line {number}: {line.strip()[:60]!r} is no WordNet id; write one per line")
        wordnet_ids += words
    if not wordnet_ids:
        raise CrispError(f"{where}: no line in it; write one WordNet id per line, in the order of the image names")
    return ValLabels(where, tuple(wordnet_ids), tuple(sorted(set(wordnet_ids))))


def _from_devkit(where: str) -> ValLabels:
    truth, meta = _members(where)
    id_of = _leaves(where, meta)
    try:
        numbers = [int(line) for line in truth.split()]
        wordnet_ids = tuple(id_of[number] for number in numbers)
    except (ValueError, KeyError) as error:
        raise CrispError(f"{where}: {_TRUTH}: no class {error} in {_META}; download the devkit again") from error
    return ValLabels(where, wordnet_ids, tuple(sorted(id_of.values())))


def _members(where: str) -> tuple[bytes, bytes]:
    """Ground truth and meta.mat."""
    found: dict[str, bytes] = {}
    try:
        with Location.of(where).open() as file, tarfile.open(fileobj=file, mode="r:gz") as tar:
            for info in tar:
                for end in (_TRUTH, _META):
                    if info.isreg() and info.name.endswith(end) and info.size <= _MEMBER_MAX:
                        stream = tar.extractfile(info)
                        assert stream is not None, "a regular file has a stream"
                        found[end] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise CrispError(f"{where}: {reason}; --labels takes ILSVRC2012_devkit_t12.tar.gz, whole") from error
    for end in (_TRUTH, _META):
        if end not in found:
            raise CrispError(f"{where}: no {end} in it; give ILSVRC2012_devkit_t12.tar.gz")
    return found[_TRUTH], found[_META]


def _leaves(where: str, meta: bytes) -> dict[int, str]:
    """WordNet ids by ILSVRC2012_ID, of the synsets that are classes: the leaves of the hierarchy."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise CrispError(
            f"{where}: needs scipy; install 'crisp-ssl[devkit]', or give a text file with one WordNet id per image"
        ) from error
    try:
        # The struct has one record per synset, and a scalar in every field but words, gloss and children.
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"].reshape(-1)
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except (KeyError, ValueError, TypeError, AttributeError, zlib.error, OSError) as error:
        raise CrispError(f"{where}: {_META}: {error!r}; download the devkit again") from error
