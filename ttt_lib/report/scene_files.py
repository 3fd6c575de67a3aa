"""The files that adaptation to several photographs leaves: depth in one scale, cloud, cameras, pictures, record, page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image
from plotly.io import to_html

from ttt_lib.adaptation.photographs.evidence import scaled
from ttt_lib.adaptation.photographs.scene import SceneAdaptation, adapt_scene, guess_focal
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.saved_weights import save_weights, use_weights
from ttt_lib.core.at_work import at_work
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import UserError, printable
from ttt_lib.core.files import check_writable, replacing, write_json
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.sources import distinct_names
from ttt_lib.data.photographs.writers import write_colmap, write_transforms
from ttt_lib.report.figures import cloud_parts, plot_before_after
from ttt_lib.report.photo_files import COMPRESSION, about_result, about_run, check_free, surface_depth, write_depth
from ttt_lib.report.scene_cloud import SceneCloud, write_points
from ttt_lib.runs.experiment import open_model

PAGE = Environment(autoescape=True).from_string("""<!doctype html><meta charset="utf-8"><title>scene</title>
<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}img{max-width:100%}</style>
<h1>{{ photographs | length }} photographs, {{ cloud_points }} points</h1>{{ figure }}
{% if refused %}<p>Refused: {{ refused }} Every photograph keeps the original depth, in a scale of its own.</p>
{% else %}<p>Depth in one scale, unit: {{ unit }}.</p>{% endif %}
<ul>{% for name, why in left_out %}<li>{{ name }}: {{ why }}</li>{% endfor %}</ul>
{% for row in photographs %}<h2>{{ row.name }}</h2><p>{{ row.decision }}.{% if not refused %} {{ row.reason }}{% endif %}</p>
<img loading="lazy" src="before_after/{{ row.file }}.jpg" alt="before and after">{% endfor %}""")
Announce = Callable[[str], None]


def adapt_photographs(
    source: Any, output: Path, config: ExperimentConfig, options: dict[str, Any], save: Path | None, begin: Path | None,
    announce: Announce,
) -> dict[str, Any]:  # fmt: skip
    """What `ttt-depth scene` does: load, adapt, write; returns the record.

    Args:
        source: photographs, their folder, a clip or a COLMAP model, as `load_scene` takes them.
        output: the folder of `write_scene`.
        config: an experiment with a section `supervision.photographs`.
        options: of `load_scene`.
        save: where to keep the adapted weights; begin: weights that were kept, to begin with.
        announce: called with a line for each thing that happens.

    Raises:
        UserError: for an experiment that knows nothing of photographs, and for whatever cannot be read or written.
    """
    check_free(output)
    check_writable(output)
    settings = config.supervision.get("photographs")
    if settings is None:
        raise UserError(f"--experiment {config.name}: knows nothing of several photographs; use scene.")
    if save is not None:
        if not (settings.train and config.train.method == "ttt" and config.train.passes):
            raise UserError(f"--save-weights {save}: {config.name} trains nothing; use --experiment scene_trained.")
        if save.is_dir():
            raise UserError(f"--save-weights {save}: is a folder; name a file in it.")
        check_writable(save)
    model = open_model(config)
    if begin is not None:
        use_weights(model, begin)
    announce("looking for the cameras")
    prior = None if options.get("cameras") else guess_focal(model, config.views.longest_side)
    with at_work("looking for the cameras"):
        scene = load_scene(source, prior=prior, seed=config.seed, **options)
    for name, why in scene.left_out:
        announce(f"left out: {name}: {why}")
    announce(f"refused: {scene.refused}" if scene.refused else repr(scene))
    if straight := scene.about.get("undistorted"):
        announce(f"{straight} photographs: the distortion of their lenses is removed; images/ holds them without it")
    if not scene.refused:
        announce("measuring depth between the photographs" + (" and training" if settings.train else ""))
    with at_work("measuring"):
        adaptation = adapt_scene(model, scene, config, progress=True)
    if save is not None and adaptation.weights:
        save_weights(save, model, adaptation.weights)
    record = write_scene(adaptation, output, announce)
    announce(f"{record['seconds']:.1f} s of adaptation -> {output / 'index.html'}")
    return record


def write_scene(adaptation: SceneAdaptation, output: Path, announce: Announce = lambda line: None) -> dict[str, Any]:
    """Predict every photograph and write the folder of a scene, in one step.

    Args:
        adaptation: of `adapt_scene`.
        output: the folder; an earlier result in it is replaced.
        announce: called with a line for each photograph.

    Returns:
        The record, as it is in `record.json`.

    Raises:
        UserError: the folder holds something else, or cannot be written.

    The folder holds, of each photograph, `depth/NAME.png` (16 bits, MoGe's logarithmic encoding), `depth/NAME.npy`
    (H,W) float32 (inf where there is no surface, NaN where it is not known, as beyond what a lens with pincushion
    distortion saw), `depth_original/NAME.npy` (the same before adaptation, in the model's own scale),
    `images/NAME.png` and `before_after/NAME.jpg`; `index.html` and `record.json`; of a scene that was reconstructed
    also `cloud.ply` and `cloud.glb` (y up), `sparse/0` (COLMAP text) and `transforms.json` (nerfstudio). All depth is
    in one scale: metres for metric models, else arbitrary. Photographs that were left out, and those of a refused
    scene, are in their own scale. Cameras and depth belong to the pictures in `images`, from which the distortion of
    lenses is removed (beyond what such a lens saw these repeat their border).
    """
    check_free(output)
    scene, cloud, rows = adaptation.scene, SceneCloud(), []
    evidence = {each.photograph.name: each for each in adaptation.evidence}
    names = [photograph.name for photograph in [*scene.photographs, *scene.rest]]
    files = dict(zip(names, distinct_names([Path(name.replace("/", "_")) for name in names])))
    with replacing(output.absolute()) as work:
        for folder in ("depth", "depth_original", "images", "before_after"):
            (work / folder).mkdir()
        results = adaptation.results()
        for number, name in enumerate(names, 1):
            known = evidence.get(name)
            with at_work(f"{number}/{len(names)} {printable(name, 100)}"):
                photograph, result = next(results)
                if known is not None and result.decision == "original":
                    result = replace(result, final=scaled(result.final, known.used))  # so that all have one scale
                if known is not None:
                    cloud.add(photograph, result.image, result.final)
                _write_photograph(work, files[name], result, known is not None)
            camera = {"intrinsics": photograph.intrinsics, "pose": photograph.pose}
            camera = {key: None if value is None else value.tolist() for key, value in camera.items()}
            rows.append({"name": name, "file": files[name], **about_result(result), **camera})
            why = f" ({result.reason})" if result.reason and known is not None else ""  # the others' has been said
            announce(f"{number}/{len(names)} {name}: {result.decision}{why}")
        if evidence:
            announce("one cloud, cameras and page")
        with at_work("cloud, cameras and page"):
            return _finish(adaptation, work, cloud, rows, files)


def _write_photograph(work: Path, name: str, result: AdaptResult, in_scene: bool) -> None:
    write_depth(work / "depth" / name, result.final)
    np.save(work / "depth_original" / f"{name}.npy", surface_depth(result.original))
    array = (result.image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array).save(work / "images" / f"{name}.png", compress_level=COMPRESSION)
    if in_scene:  # in the scale of the final prediction, so that their ratio says what changed
        before = result.original.depth
        factor = (result.final.depth / before).nanmedian().nan_to_num(1.0)
        result = replace(result, original=replace(result.original, depth=before * factor))
    figure = plot_before_after(result.image, result)
    figure.savefig(work / "before_after" / f"{name}.jpg", dpi=100, pil_kwargs={"quality": 88})


def _finish(
    adaptation: SceneAdaptation, work: Path, cloud: SceneCloud, rows: list[dict[str, Any]], files: dict[str, str]
) -> dict[str, Any]:
    """What is written once for all photographs; returns the record. files: name of a photograph -> of its files."""
    scene, model = adaptation.scene, adaptation.model
    points, colours = cloud.merged()
    write_points(points, colours, work / "cloud.ply", work / "cloud.glb")
    if adaptation.evidence:
        places = [work / "images" / f"{files[photograph.name]}.png" for photograph in scene.photographs]
        written = [replace(p, source=partial(read_photo, place)) for p, place in zip(scene.photographs, places)]
        write_colmap(work / "sparse" / "0", replace(scene, photographs=written))
        write_transforms(work / "transforms.json", scene, places)
    record = {
        "refused": scene.refused, "left_out": [list(each) for each in scene.left_out], "scene": scene.about,
        "unit": "metre" if model.kind == "metric" else "arbitrary, one for all photographs of the scene",
        "depth_png": "16 bits, logarithmic; `near`, `far` in its own metadata (moge.utils.io.read_depth)",
        "photographs": rows, "seconds": sum((row["seconds"] for row in rows), 0.0), "failed": adaptation.failed,
        "peak_memory_mb": adaptation.peak_memory_mb, "history": adaptation.log.history,
        **about_run(model, adaptation.config), "cloud_points": len(points),
    }  # fmt: skip
    shown = cloud_parts(points, colours) if len(points) else None
    figure = to_html(shown, full_html=False, include_plotlyjs="inline", validate=False) if shown else ""
    (work / "index.html").write_text(PAGE.render(record, figure=Markup(figure)), encoding="utf-8")
    write_json(work / "record.json", record)
    return record
