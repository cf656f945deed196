"""``ca2cl report``: one HTML page about a run, readable offline."""

from __future__ import annotations

import sys
from pathlib import Path

from ca2cl.common.console.summary import closing
from ca2cl.common.files import check_writable, replacing, writing
from ca2cl.errors import InputError
from ca2cl.report.config import ReportConfig
from ca2cl.report.material import read_material
from ca2cl.report.page import build
from ca2cl.runtime.device import find_device
from ca2cl.store.run_artifacts import add_artifact

_REMEDY = "give a file in a folder you can write"


def run(config: ReportConfig) -> int:
    """Write the page, say what is missing in it, and log it. Returns the exit code.

    Raises:
        InputError: no such run, shards that were named and cannot be read, an ``out`` that cannot be written.
    """
    out = Path(config.out)
    check_writable(out, "out")
    device = find_device(config.device)
    material = read_material(config.run, config.tracking)
    page = build(config, material, device)
    content = page.html.encode()
    with writing(out, _REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            file.write(content)
    sys.stdout.write("".join(f"missing: {gap}\n" for gap in page.gaps))
    sys.stdout.write(f"report of run {material.run_id} in {out}: {page.tiles} tiles, {len(content) / 1e6:.1f} MB\n")
    sys.stdout.flush()
    if not config.no_log:  # last, so that a store that is away costs no page
        if material.store is None:
            raise InputError(f"{out}: written, but not logged: {material.fault}; or use --no-log")
        add_artifact(material.store, material.run_id, out, "report")
        sys.stdout.write(f"logged to run {material.run_id} in {material.store.place} as report/{out.name}\n")
    sys.stdout.write(closing("a page about a run", out, f"open it in a browser: {out.resolve().as_uri()}"))
    return 0
