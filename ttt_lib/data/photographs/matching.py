"""Features of gray pictures and their verified matches, in the database of a job; copies and photographs that show something
else are left out. Runs in a process of its own.

The database lies in the job's folder; photograph k has the id k + 1 in it, and so have camera k and its rig.
"""

from __future__ import annotations

import ctypes
import itertools
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pycolmap

from ttt_lib.data.photographs.job import MIN_MATCHES, USUAL_FOCAL, Job, Lens, Refusal

ALL_PAIRS = 16  # up to so many photographs, each is compared with each
PARTNERS, NEIGHBORS = 8, 4  # with more: the likeliest, and in a clip those before and after
COARSE = 256  # of each picture's features, the largest, decide which pictures are compared
TWIN, TWIN_DISTANCE = 0.97, 0.03  # cosine of descriptors that look the same, of the picture how far apart they are
FLAT_ERROR = 0.003  # of the longer side: three times what features are off by, a third of what relief moves them by
FLAT = 0.88  # of the matches: rooms and streets, seen with little parallax, have up to 0.8; posters and turns 0.91 to 1
TWINS = 0.5  # of the larger features of a picture: from 0.94 where a pattern repeats, elsewhere 0.2 at most
MOVED = 0.0012  # of the longest side: what three quarters of the matches of a copy stay below
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def image_name(index: int) -> str:
    """The name of a photograph in the database."""
    return f"{index:06d}"


def tolerance(longest: int) -> float:
    """How far from its place a match may lie (pixels) in pictures of this longer side: the usual 4 of large ones make
    planes of whole streets in small ones."""
    return min(4.0, max(1.5, longest / 300))


def database_of(job: Job) -> Path:
    """Where the job's database lies."""
    return job.folder / "database.db"


def _features_of(job: Job, numbers: Iterable[int]) -> None:
    """SIFT of some of the job's pictures into a file each: places and shapes (N,6), descriptors (N,128)."""
    options = pycolmap.FeatureExtractionOptions(num_threads=1, use_gpu=False)
    options.sift.max_num_features = 4096 if len(job.pictures) <= 8 else 2048
    extractor = pycolmap.FeatureExtractor.create(options, pycolmap.Device.cpu)
    for number in numbers:
        keypoints, descriptors = extractor.extract_from_uint8_array(np.load(job.folder / f"gray_{number}.npy"))
        places = pycolmap.keypoints_to_matrix(keypoints)
        np.savez(job.folder / f"features_{number}.npz", places=places, data=descriptors.data)


def _forked(job: Job, numbers: Iterable[int]) -> None:
    """`_features_of` in a process that is killed with the one that forked it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _features_of(job, numbers)


def _features(job: Job) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `_features_of` finds in each picture."""
    count = len(job.pictures)
    # It is the one thing of pycolmap that holds Python's lock. Elsewhere processes cannot be forked, or not safely.
    workers = min(job.threads, count) if sys.platform == "linux" else 1
    shares = [range(first, count, workers) for first in range(workers)]
    others = [get_context("fork").Process(target=_forked, args=(job, share)) for share in shares[1:]]
    for process in others:
        process.start()
    _features_of(job, shares[0])
    for process in others:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the search for features ended with {process.exitcode}")
    for number in range(count):
        with np.load(job.folder / f"features_{number}.npz") as found:
            yield found["places"], found["data"]


def extract(job: Job, lenses: list[Lens], known: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """SIFT of the gray pictures into the database; known: of each lens whether its focal length comes from somewhere.

    Returns the largest descriptors of each picture, (N,COARSE,128), and its `_twins`, (N,).
    """
    job.lenses = lenses
    coarse, twins = [], []
    with closing(pycolmap.Database.open(database_of(job))) as database:
        sensors = [pycolmap.sensor_t(pycolmap.SensorType.CAMERA, number + 1) for number in range(len(lenses))]
        for sensor, lens, is_known in zip(sensors, lenses, known):
            camera = pycolmap.Camera(camera_id=sensor.id, **lens._asdict())
            camera.has_prior_focal_length = is_known
            database.write_camera(camera, use_camera_id=True)
            rig = pycolmap.Rig(rig_id=sensor.id)
            rig.add_ref_sensor(sensor)
            database.write_rig(rig, use_rig_id=True)
        for index, (keypoints, data) in enumerate(_features(job)):
            sensor = sensors[job.camera_of[index]]
            image_id = database.write_image(pycolmap.Image(name=image_name(index), camera_id=sensor.id))
            frame = pycolmap.Frame(rig_id=sensor.id)
            frame.add_data_id(pycolmap.data_t(sensor, image_id))
            database.write_frame(frame)
            database.write_keypoints(image_id, keypoints)
            database.write_descriptors(image_id, pycolmap.FeatureDescriptors(pycolmap.FeatureExtractorType.SIFT, data))
            by_size = np.argsort(-np.abs(keypoints[:, 2:6]).max(1, initial=0), kind="stable")
            largest = by_size[:COARSE]
            twins.append(_twins(keypoints[:, :2], data, by_size))
            coarse.append(np.pad(data[largest], ((0, COARSE - len(largest)), (0, 0))))
    return np.array(coarse), np.array(twins)


def _twins(places: np.ndarray, descriptors: np.ndarray, by_size: np.ndarray) -> float:
    """The share of a picture's features that look like another one elsewhere in it.

    Asked are at most 500 of its largest third: small ones (a speckle, the end of a twig) look alike in any picture.
    """
    if len(places) < 2:
        return 0.0
    third = by_size[: -(-len(by_size) // 3)]
    asked = third[:: -(-len(third) // 500)]
    unit = descriptors / np.maximum(np.linalg.norm(descriptors.astype(np.float32), axis=1, keepdims=True), 1e-6)
    alike = unit[asked] @ unit.T > TWIN
    apart = np.linalg.norm(places[asked, None] - places[None], axis=-1) > TWIN_DISTANCE * np.ptp(places, axis=0).max()
    return float((alike & apart).any(1).mean())


def _likeness(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the largest features (K,128) of two pictures find each other."""
    product = one.astype(np.float32) @ other.astype(np.float32).T
    there, back = product.argmax(1), product.argmax(0)
    ordered = np.partition(product, -2, axis=1)
    clear = ordered[:, -1] * 0.95 > ordered[:, -2]  # cosines: the second best is clearly further away
    return int(((back[there] == np.arange(len(one))) & clear).sum())


def choose_pairs(coarse: np.ndarray, in_order: bool) -> list[tuple[int, int]]:
    """Which pictures to compare, by their largest features (N,K,128); in_order: frames of a clip."""
    count = len(coarse)
    everything = list(itertools.combinations(range(count), 2))
    if count <= ALL_PAIRS:
        return everything
    likeness = np.zeros((count, count), dtype=np.int64)
    for i, j in everything:
        likeness[i, j] = likeness[j, i] = _likeness(coarse[i], coarse[j])
    likeliest = np.argsort(-likeness, kind="stable")[:, :PARTNERS]
    chosen = {(min(i, j), max(i, j)) for i, partners in enumerate(likeliest.tolist()) for j in partners if i != j}
    return sorted(chosen | {(i, j) for i, j in everything if in_order and j - i <= NEIGHBORS})


def verify(job: Job, coarse: np.ndarray) -> None:
    """Mutual matching and guided geometric verification of the likely pairs of the photographs that take part.

    coarse: of `extract`. Fills in the job's pairs, and of each pair inliers, moved and flat.
    """
    kept = job.kept
    job.pairs = [(kept[i], kept[j]) for i, j in choose_pairs(coarse[kept], job.in_order)]
    pairing = pycolmap.ImportedPairingOptions(match_list_path=job.folder / "pairs.txt")
    lines = [f"{image_name(i)} {image_name(j)}\n" for i, j in job.pairs]
    pairing.match_list_path.write_text("".join(lines), encoding="utf-8")
    options = pycolmap.FeatureMatchingOptions(num_threads=job.threads, use_gpu=False, guided_matching=True)
    verification = pycolmap.TwoViewGeometryOptions(detect_watermark=False)
    verification.max_H_inlier_ratio = 1.0  # never a plane alone: what lies off it would be lost
    verification.ransac.random_seed, verification.ransac.max_error = job.seed, tolerance(job.longest)
    pycolmap.set_random_seed(job.seed)
    pycolmap.match_image_pairs(database_of(job), options, pairing, verification, pycolmap.Device.cpu)
    ransac = pycolmap.RANSACOptions(max_error=FLAT_ERROR * job.longest, random_seed=job.seed, max_num_trials=2000)
    rows = []
    with closing(pycolmap.Database.open(database_of(job))) as database:
        for pair in np.array(job.pairs) + 1:
            matches, moved, flat = np.zeros((0, 2), int), np.inf, 0.0
            if database.exists_two_view_geometry(*pair):
                matches = database.read_two_view_geometry(*pair).inlier_matches
            if len(matches) >= 8:
                first, second = (
                    database.read_keypoints(k)[matches[:, side], :2].astype(float) for side, k in enumerate(pair)
                )
                moved = np.quantile(np.linalg.norm(first - second, axis=1), 0.75)
                homography = pycolmap.estimate_homography_matrix(first, second, ransac)
                flat = homography["num_inliers"] / len(matches) if homography else 0.0
            rows.append((len(matches), moved, flat))
    inliers, job.moved, job.flat = np.array(rows, float).reshape(-1, 3).T
    job.inliers = inliers.astype(int)


def match(job: Job) -> None:
    """Features and verified matches in the database; copies and strangers are left out."""
    first: dict[str, int] = {}
    for index, digest in enumerate(job.digests):
        if digest in first:
            job.leave_out(index, f"is a copy of {job.pictures[first[digest]].name}")
        first.setdefault(digest, index)
    _enough_places(job)
    keys = [(*size, picture.camera) for size, picture in zip(job.sizes, job.pictures)]
    cameras = list(dict.fromkeys(keys))
    job.camera_of = [cameras.index(key) for key in keys]
    focals, exact = job.focals()
    lenses = [
        Lens("SIMPLE_PINHOLE", width, height, ((focal or USUAL_FOCAL) * width, width / 2, height / 2))
        for focal, (width, height, _) in zip(focals, cameras)
    ]
    coarse, twins = extract(job, lenses, exact)
    alike = float(np.median(twins[job.kept]))
    if alike > TWINS:
        raise Refusal(
            f"the photographs show one pattern again and again ({alike:.0%} of its details have a twin elsewhere in the "
            "same picture), so which is which cannot be told: take in things that are there only once."
        )
    verify(job, coarse)
    for (i, j), count, distance in zip(job.pairs, job.inliers, job.moved):
        if i in job.kept and j in job.kept and count >= MIN_MATCHES and distance < MOVED * max(job.sizes[j]):
            job.leave_out(j, f"is a copy of {job.pictures[i].name}, or taken from the same place")
    _enough_places(job)
    _leave_out_strangers(job)
    _refuse_flat(job)


def too_few(most: int) -> Refusal:
    """What to raise where no two photographs have more matches than that."""
    return Refusal(
        f"the photographs share too few points ({most} matches at most, {MIN_MATCHES} are needed): they must show the same "
        "things, with texture, and overlap by half or more."
    )


def _enough_places(job: Job) -> None:
    if len(job.kept) < 2:
        if len(job.pictures) == 2:
            index, why = next(iter(job.left_out.items()))
            why = why if "," in why else f"{why}, or taken from the same place"
            raise Refusal(f"{job.pictures[index].name} {why}: take a second photograph a step to the side.")
        raise Refusal(
            "all photographs are taken from the same place or are copies of one: take the others a step to the side."
        )


def _leave_out_strangers(job: Job) -> None:
    """All but the largest group of photographs in which each is linked to the others by matches."""
    # Here and not above: it takes half a second, and `mapping.read` needs none of it.
    from scipy.sparse.csgraph import connected_components

    kept = list(job.kept)
    counts = np.zeros((len(kept), len(kept)), dtype=int)
    for (i, j), count in zip(job.pairs, job.inliers):
        if i in kept and j in kept:
            counts[kept.index(i), kept.index(j)] = counts[kept.index(j), kept.index(i)] = count
    number, group = connected_components(counts >= MIN_MATCHES, directed=False)
    best, size = counts.max(1), np.bincount(group)
    largest = max(range(number), key=lambda each: (size[each], best[group == each].sum()))
    if size[largest] < 2:
        raise too_few(best.max())
    for index, own, most in zip(kept, group, best):
        if own != largest:
            few = f" ({most} matches at most)" if size[own] == 1 else ""
            job.leave_out(index, f"shares too few points with the others{few}: it shows something else")


def _refuse_flat(job: Job) -> None:
    """Where one homography explains each pair, nothing has depth: cameras that turned, walls and posters alike."""
    pairs = zip(job.pairs, job.flat, job.inliers)
    if min(flat for pair, flat, count in pairs if count >= MIN_MATCHES and set(pair) <= set(job.kept)) > FLAT:
        raise Refusal(
            "the camera only turned, or everything in sight is flat or far away: no depth can be told from that; take "
            "the photographs from places a step apart, with things at several distances in them."
        )
