"""Export to ONNX, with normalisation inside and a dynamic batch.

The normalisation is inside because the programs that read ONNX (viewers, browsers, servers in other languages) have no
card to read it from. The resize to the card's side is not: it is up to whoever cuts the tiles.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from ca2cl.common.optional import need
from ca2cl.common.records import json_line
from ca2cl.common.scratch import scratch_folder
from ca2cl.export.target import EXTRA, Features, Target
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import EncoderCard

INPUT, OUTPUT = "tiles", "features"
OPSET = 17  # what torch 2.6 already writes and every onnxruntime of the last years reads


def _traced(encoder: Backbone, card: EncoderCard) -> bytes:
    # By tracing (dynamo=False): at one image size a body has no branches, and it needs neither onnxscript nor a version
    # of it that fits torch's. Two tiles, because torch takes a one for a constant.
    tiles_BCHW = torch.zeros(2, 3, card.input_size, card.input_size)
    axes = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
    with scratch_folder() as scratch, warnings.catch_warnings():
        path = Path(scratch) / "traced.onnx"
        warnings.simplefilter("ignore")  # that dynamo is the default now
        torch.onnx.export(
            nn.Sequential(Normalize(card.mean, card.std), encoder).eval(),
            (tiles_BCHW,),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
        return path.read_bytes()


class Onnx(Target):
    """A graph from RGB in [0, 1] to features."""

    name, package = "onnx", "onnxruntime"
    suffixes = (".onnx",)
    tolerance = 1e-4

    def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
        onnx = need("onnx", EXTRA)
        graph = onnx.load_from_string(_traced(encoder, card))
        side = card.input_size
        notes = {
            "card": json_line(asdict(card)).decode().strip(),
            "input": f"float32 (batch, 3, {side}, {side}), RGB in [0, 1]; the normalisation is in the graph",
            "output": f"float32 (batch, {card.feature_dim})",
        }
        onnx.helper.set_model_props(graph, notes)
        onnx.checker.check_model(graph, full_check=True)
        return {out.name: graph.SerializeToString()}

    def native(self, path: Path, card: EncoderCard) -> Features:
        onnxruntime = need("onnxruntime", EXTRA)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def features(tiles_BCHW: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {INPUT: tiles_BCHW.numpy()})[0])

        return features

    def snippet(self, path: Path, card: EncoderCard) -> str:
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
            f"model = lambda tiles: session.run(None, {{{INPUT!r}: tiles}})[0]  # float32 array of RGB in [0, 1]\n"
        )


ONNX = Onnx()
