"""Predict from the images that a client sends: vectors or classes.

MLflow runs ``serve_encoder.py`` or ``serve_classifier.py``, which name one of these each; nothing is pickled. The saved
model has no input signature, because every one that MLflow 3.17 knows refuses some of the forms that clients send. With
a column ``image`` of any type, Python's ``predict([jpeg_bytes])`` is an error. With a column or tensor without a name,
so are ``{"inputs": {"image": [...]}}`` and a table with further columns. And a binary column makes MLflow decode base64
itself: it drops what is no base64 instead of complaining, and its complaints name no row.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from torch import Tensor

from ca2cl.data.decode import decode
from ca2cl.errors import InputError
from ca2cl.models.encoder_io import WEIGHTS_NAME, load_encoder, read_weights
from ca2cl.models.preprocess import preprocess

COLUMN = "image"
_BASE64 = re.compile(rb"[A-Za-z0-9+/=\s]+")
_CHUNK = 64  # images that are decoded and encoded at a time: bounds the memory of a large request


class BadRequest(InputError, mlflow.exceptions.MlflowException):
    """A fault of the request and not of the server: HTTP 400, with its own message.

    Of any other exception MLflow's scoring server sends the client nothing but a stack trace. In front of the message
    of an MlflowException it puts the whole request, megabytes of base64; so ``message`` cannot be set.
    """

    def __init__(self, message: str) -> None:
        mlflow.exceptions.MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return str(self)

    @message.setter
    def message(self, text: str) -> None:
        pass


class TileEncoder:
    """Features of tiles: encoded images (JPEG, PNG, TIFF, …) as bytes or base64 text → float32 (N, feature_dim)."""

    def load_context(self, context: Any) -> None:
        """Read the weights and the card; use a GPU if there is one."""
        encoder, self._card = load_encoder(Path(context.artifacts["encoder"]))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder = encoder.to(self._device)

    # No annotations: MLflow would take them for the only container to let through.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Features of every image of a list, an array, a data frame's ``image`` (or only) column, or ``{image: […]}``.

        Returns:
            float32 (N, feature_dim), in the order of the input.

        Raises:
            BadRequest: no column of images, or one that cannot be decoded; names its row.
        """
        return self._features(model_input)

    def _features(self, model_input: Any) -> npt.NDArray[np.float32]:
        images = _column(model_input)
        parts = [self._encode(images, start) for start in range(0, len(images), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros((0, self._card.feature_dim), np.float32)

    def _encode(self, images: Sequence[Any], start: int) -> npt.NDArray[np.float32]:
        rows = range(start, min(start + _CHUNK, len(images)))
        x_BCHW = torch.cat([self._tile(images[row], row) for row in rows]).to(self._device)
        with torch.inference_mode():
            features: npt.NDArray[np.float32] = self._encoder(x_BCHW).float().cpu().clone().numpy()
        return features

    def _tile(self, image: Any, row: int) -> Tensor:
        try:
            tile_HWC = decode(_to_bytes(image))
        except (ValueError, TypeError) as error:  # BadSample, or what base64 raises
            raise BadRequest(f"image in row {row}: {error}; send encoded image bytes, or base64 of them") from None
        card = self._card
        return preprocess(torch.from_numpy(tile_HWC)[None], card.input_size, card.mean, card.std)


def _column(model_input: Any) -> Sequence[Any]:
    """The images as a sequence, whatever container they came in."""
    if isinstance(model_input, (bytes, bytearray, str)):
        return [model_input]
    if hasattr(model_input, "columns") or isinstance(model_input, dict):
        names = list(model_input.keys())
        if not names:  # no records at all
            return []
        if COLUMN not in names and len(names) != 1:
            raise BadRequest(f"input has the columns {names}: send the images in one called {COLUMN!r}")
        model_input = model_input[COLUMN if COLUMN in names else names[0]]
    return list(np.asarray(model_input, dtype=object).ravel())


def _to_bytes(image: Any) -> bytes:
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        if not _BASE64.fullmatch(data[:64]):  # every image format has other bytes at its head
            return data
        image = data.decode()  # MLflow's scoring server hands base64 on as bytes
    if isinstance(image, str):
        text = image.partition(",")[2] if image.startswith("data:") else image
        return base64.b64decode("".join(text.split()), validate=True)  # MLflow's own base64 has line breaks
    raise TypeError(f"{type(image).__name__} is not the type of an image")


class TileClassifier(TileEncoder):
    """Classes of tiles, by the head ``fc`` that lies with the encoder's weights."""

    def load_context(self, context: Any) -> None:
        """Read the head as well."""
        super().load_context(context)
        path = Path(context.artifacts["encoder"]) / WEIGHTS_NAME
        weights = read_weights(path)
        self._weight_KD, self._bias_K = weights["fc.weight"].numpy(), weights["fc.bias"].numpy()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """A row for every image, in the order of the input: ``prediction``, the name of the most probable class, and
        ``probability_NAME`` for each class.

        Raises:
            BadRequest: as ``TileEncoder.predict``.
        """
        logits_NK = self._features(model_input) @ self._weight_KD.T + self._bias_K
        odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
        probability_NK = odds_NK / odds_NK.sum(axis=1, keepdims=True)
        names = list(self._card.predicts)
        frame = pd.DataFrame(probability_NK, columns=[f"probability_{name}" for name in names])
        frame.insert(0, "prediction", np.asarray(names, object)[probability_NK.argmax(axis=1)])
        return frame
