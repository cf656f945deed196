"""Resolve whatever names an encoder to a ``Backbone`` and its card."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ca2cl.common.arch_names import RANDOM, TORCHVISION, canonical_arch
from ca2cl.common.files import file_digest
from ca2cl.common.records import why_not_tensors
from ca2cl.common.redact import redact
from ca2cl.common.scratch import scratch_folder
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, TrackingConfig
from ca2cl.data.fingerprints.seen import Seen, read_seen
from ca2cl.errors import InputError
from ca2cl.models.backbone import DEFAULT_ARCH, Backbone, build_encoder, check_arch
from ca2cl.models.encoder_io import (
    CARD_NAME,
    ENCODER_PATH,
    WEIGHTS_NAME,
    EncoderCard,
    Head,
    load_encoder,
    make_encoder,
    read_head,
    weights_digest,
)
from ca2cl.models.resnet import require_resnet
from ca2cl.models.timm.spelling import split_arch
from ca2cl.registry.register import CHAMPION
from ca2cl.registry.versions import ELSEWHERE, LATEST, existing_store, find_version
from ca2cl.store.artifacts import fetch, names_in, run_place, version_place
from ca2cl.store.names import WORD, full_run_id, is_stored
from ca2cl.store.open import DEFAULT_ROOT, Store, fetch_run, store_place
from ca2cl.weights.find import WeightsFile, find_in_folder, find_local, find_public, is_public
from ca2cl.weights.load import DEFAULT_SIZE, Start, load_weights

logger = logging.getLogger(__name__)
_FORMS = (
    "a run id or its first digits, a version's number, an alias such as champion, models:/NAME/VERSION, "
    "models:/NAME@ALIAS, a run folder, a .safetensors, .pth, .bin or .tar file, timm:NAME.TAG, hf-hub:ORG/NAME, "
    "torchvision:IMAGENET1K_V1, or random"
)


@dataclass(frozen=True)
class ResolvedEncoder:
    """An encoder in eval mode on the CPU, its card, and where it came from."""

    encoder: Backbone
    card: EncoderCard
    source_run_id: str | None
    """MLflow run that made it, as far as known."""
    uri: str
    """Name of what was resolved, without secrets: a version's number in place of its alias."""
    bare: bool = False
    """True if the weights came without a card: normalisation and size are then ImageNet's."""
    start: Start | None = None
    """File that the weights were read from; None for random ones."""
    head: Head | None = None
    """Of a classifier, whose classes are ``card.predicts``."""
    seen: Seen | None = None
    """Tiles that it was trained on, where that was kept."""

    def digest(self) -> str:
        """SHA-256 of the weights and the normalisation; of an encoder on the CPU."""
        return weights_digest(self.encoder, self.card.mean, self.card.std)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"uri": self.uri, "source_run_id": self.source_run_id, "card": asdict(self.card)}

    def beside(self, first: ResolvedEncoder) -> ResolvedEncoder:
        """This encoder in a comparison with ``first``: bare weights see tiles at its size, or they would be compared by
        that, too."""
        return self.at(first.card.input_size) if self.bare else self

    def at(self, size: int) -> ResolvedEncoder:
        """This encoder for tiles of ``size`` pixels. A body that is made for one size only (Swin) is built again.

        Raises:
            InputError: the body cannot take such tiles.
        """
        if size == self.card.input_size:
            return self
        encoder, card = self.encoder, replace(self.card, input_size=size)
        if not encoder.any_size:
            encoder = make_encoder(encoder.state_dict(), card.arch, self.uri, size, card.pooling)
        return replace(self, encoder=encoder, card=card)


def resolve_encoder(
    source: str,
    *,
    tracking_uri: str | None = None,
    root: str | Path | None = None,
    arch: str | None = None,
    like: EncoderCard | None = None,
) -> ResolvedEncoder:
    """Find and load an encoder.

    Args:
        source: a run id or its first digits, ``runs:/ID``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, a
            version's number or an alias (as ``find_version`` takes them); a run folder, a folder that
            ``save_encoder`` wrote or one of a timm model; ``timm:NAME.TAG``, ``hf-hub:ORG/NAME[/FILE][@REVISION]``,
            ``torchvision:WEIGHTS``, ``random`` or ``random:SEED``; or a safetensors or torch file of a layout of
            ``weights.layouts``, with ``arch``.
            Where a file or folder has the name that a version or a run goes by, it is the file or folder.
        tracking_uri: MLflow store of runs and models; none takes MLFLOW_TRACKING_URI or the embedded store.
        root: folder of the embedded store.
        arch: the architecture that is wanted, as the user named it; none takes the card's, or resnet18 where there is
            no card.
        like: card of the encoder that random weights are compared with: they have its input and its pooling.

    Raises:
        InputError: nothing there, the store cannot be reached, another architecture, or weights that do not fill every
            tensor of the backbone exactly.
    """
    if arch is not None:
        check_arch(arch)
        arch = canonical_arch(arch)
    if source == RANDOM or source.startswith(f"{RANDOM}:"):
        found = _random(source, arch or DEFAULT_ARCH, like)
    elif source.startswith(TORCHVISION):
        found = _torchvision(source, arch or DEFAULT_ARCH)
    elif is_public(source):
        found = _from_weights(find_public(source), arch)
    elif is_stored(source):
        found = _from_store(source, _store(source, tracking_uri, root), arch)
    elif (named := stored_name(source, tracking_uri, root)) is not None:
        found = _from_store(named, _store(source, tracking_uri, root), arch)
    else:
        found = _from_path(Path(source).expanduser(), arch)
    if arch is not None and found.card.arch != arch:  # of a card
        raise InputError(
            f"{source}: the encoder is a {found.card.arch}, not a {arch}; give --model.arch or another one"
        )
    return found


def _bare_card(encoder: Backbone, size: int = DEFAULT_SIZE) -> EncoderCard:
    """Card of weights that came without one: with ImageNet's normalisation."""
    return EncoderCard(
        arch=encoder.arch,
        feature_dim=encoder.feature_dim,
        input_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        pooling=encoder.pooling,
    )


def _random(source: str, arch: str, like: EncoderCard | None) -> ResolvedEncoder:
    seed = source.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise InputError(f"encoder {source!r}: the seed is no number; use random or random:SEED")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers must not depend on this
        torch.manual_seed(int(seed))
        if like is None or like.arch != arch:
            encoder = build_encoder(arch).eval()
            return ResolvedEncoder(encoder, _bare_card(encoder), None, source, bare=True)
        encoder = build_encoder(arch, image_size=like.input_size, pooling=like.pooling).eval()
        card = replace(_bare_card(encoder, like.input_size), mean=like.mean, std=like.std)
        return ResolvedEncoder(encoder, card, None, source, bare=True)


def _torchvision(source: str, arch: str) -> ResolvedEncoder:
    from torchvision.models import get_model_weights

    name = source.partition(":")[2]
    require_resnet(arch, f"encoder {source!r}")
    known = get_model_weights(arch).__members__
    if name not in known:
        raise InputError(f"encoder {source!r}: torchvision has {', '.join(known)} for {arch}")
    file = Path(known[name].url).name
    try:
        with redirect_stdout(sys.stderr):  # torch prints that it downloads, and stdout is for results
            state = known[name].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # noqa: BLE001 - as in _foreign_state, and all that a download may meet
        raise InputError(
            f"encoder {source!r}: cannot be downloaded or read ({why_not_tensors(error)}); put "
            f"{file} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from None
    encoder, path = make_encoder(state, arch, source), Path(torch.hub.get_dir()) / "checkpoints" / file
    tensors = len(encoder.state_dict())
    start = Start(source=source, layout="torchvision's", tensors=tensors, sha256=file_digest(path))
    return ResolvedEncoder(encoder, replace(_bare_card(encoder), **_facts(start)), None, source, bare=True, start=start)


def _from_store(source: str, store: Store, arch: str | None) -> ResolvedEncoder:
    if source.startswith("models:/"):
        entry = find_version(store, source)
        place = version_place(store, entry.name, entry.version)
        return _download(place, store, entry.run_id or None, entry.uri, arch)
    run_id = full_run_id(store, source)
    assert run_id is not None, source
    fetch_run(store, run_id)
    location = run_place(store, run_id, ENCODER_PATH)
    if not {WEIGHTS_NAME, CARD_NAME} <= set(names_in(store, location)):
        raise InputError(f"run {run_id!r}: has no encoder yet; let it finish, or send it with `ca2cl sync RUN_DIR`")
    return _download(location, store, run_id, f"runs:/{run_id}", arch)


def _store(source: str, tracking_uri: str | None, root: str | Path | None) -> Store:
    """The store, which looking for an encoder does not make."""
    where = TrackingConfig(uri=tracking_uri, root=str(root or DEFAULT_ROOT))
    store = existing_store(where)
    if store is None:
        forms = "" if is_stored(source) else f". An encoder is {_FORMS}"
        raise InputError(
            f"encoder {source!r}: not there, for there is no store in {store_place(where.uri, where.root)}; "
            f"{ELSEWHERE}{forms}"
        )
    return store


def stored_name(word: str, tracking_uri: str | None, root: str | Path | None) -> str | None:
    """``runs:/ID`` or ``models:/NAME/VERSION`` for a version's number, an alias or the first digits of a run id; None
    for what is there as a file or folder, or looks like the path of one.

    Raises:
        InputError: the store has none such, is not there, or cannot be reached.
    """
    if not WORD.fullmatch(word):
        return None
    if Path(word).expanduser().exists():
        if word.isdecimal() or word in (CHAMPION, LATEST):
            logger.info("encoder %s: the file or folder; the registry's is models:/NAME/VERSION or @ALIAS", word)
        return None
    store = _store(word, tracking_uri, root)
    try:
        entry = find_version(store, word)
    except InputError as error:
        raise InputError(f"encoder {word!r}: no file or folder of that name; {error}") from None
    by_label = word in (entry.version, LATEST, *entry.aliases)  # version 1 may be of a run whose id begins with 1
    return entry.uri if by_label else f"runs:/{entry.run_id}"


def _download(location: str, store: Store, run_id: str | None, uri: str, arch: str | None) -> ResolvedEncoder:
    with scratch_folder() as scratch:
        weights = sorted(fetch(store, location, scratch).rglob(WEIGHTS_NAME))
        if not weights:
            raise InputError(f"{uri}: holds no {WEIGHTS_NAME}; give an encoder that ca2cl registered")
        encoder, card = load_encoder(weights[0].parent, arch)
        start, head = _own(weights[0].parent, encoder, uri), read_head(weights[0].parent, card)
        seen = read_seen(weights[0].parent)
    return ResolvedEncoder(encoder, card, card.source_run_id or run_id, uri, start=start, head=head, seen=seen)


def _from_path(path: Path, arch: str | None) -> ResolvedEncoder:
    if not path.exists():
        raise InputError(f"encoder {str(path)!r}: not there; give {_FORMS}")
    if path.is_dir():
        return _from_folder(path, arch)
    if path.name == WEIGHTS_NAME and (arch is None or (path.parent / CARD_NAME).exists()):
        return _from_folder(path.parent, arch)
    return _from_weights(find_local(path), arch)


def _from_folder(path: Path, arch: str | None) -> ResolvedEncoder:
    for folder in (path / ENCODER_PATH, path):
        if (folder / WEIGHTS_NAME).exists():
            encoder, card = load_encoder(folder, arch)
            start = _own(folder, encoder, str(folder.resolve()))
            return ResolvedEncoder(
                encoder, card, card.source_run_id, str(folder), start=start, head=read_head(folder, card),
                seen=read_seen(folder),
            )  # fmt: skip
    file = find_in_folder(path)
    if file is None:
        raise InputError(
            f"encoder {str(path)!r}: the folder holds no {WEIGHTS_NAME}; let its run finish, or give {_FORMS}"
        )
    return _from_weights(file, arch)


def _from_weights(file: WeightsFile, arch: str | None) -> ResolvedEncoder:
    """Weights of another program, with what their source states in place of a card."""
    stated = file.stated
    if arch and stated.arch and split_arch(arch)[0] != split_arch(stated.arch)[0]:
        raise InputError(f"{file.source}: the encoder is a {stated.arch}, not a {arch}; use --model.arch {stated.arch}")
    encoder, size, start = load_weights(file, arch or stated.arch or DEFAULT_ARCH)
    card = replace(
        _bare_card(encoder, size),
        mean=stated.mean or IMAGENET_MEAN,
        std=stated.std or IMAGENET_STD,
        mpp=stated.mpp,
        licence=file.licence.name,
        licence_text=file.licence.text,
        **_facts(start),
    )
    return ResolvedEncoder(encoder, card, None, file.source, bare=stated.mean is None, start=start)


def _facts(start: Start) -> dict[str, Any]:
    """Fields of a card."""
    return {
        "start": start.source,
        "start_layout": start.layout,
        "start_tensors": start.tensors,
        "start_sha256": start.sha256,
    }


def _own(folder: Path, encoder: Backbone, source: str) -> Start:
    """Of an encoder that ca2cl wrote."""
    tensors, digest = len(encoder.state_dict()), file_digest(folder / WEIGHTS_NAME)
    return Start(source=redact(source), layout="ca2cl's", tensors=tensors, sha256=digest)
